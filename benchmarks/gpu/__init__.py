"""What `make gpu-report` runs on a host with a GPU; see docs/benchmarks.md."""
