"""What knows no model: errors, files, devices, processes."""
