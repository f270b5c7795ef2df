"""Publishes a saved pipeline on the Hugging Face Hub, with its model card, and a Space with its web page."""
