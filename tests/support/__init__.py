"""What several test files share: a stand-in for the Hub, known denoisers, and features of images."""
