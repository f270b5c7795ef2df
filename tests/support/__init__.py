"""What several test files share: a stand-in for the Hub, and denoisers known in closed form."""
