"""Measures models: the quality of generated images, and the accuracy and calibration of the classifier."""
