"""What the benchmarks share. Scripts import it as `lib`, since Python looks first beside the script that it runs."""
