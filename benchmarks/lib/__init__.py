"""What the benchmarks share. A script beside this directory imports it as `lib`: Python looks beside the script first."""
