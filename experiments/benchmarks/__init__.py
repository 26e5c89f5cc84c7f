"""Times, side by side with one device and with other packages."""
