"""The stages of `make gpu-report` on a host with a GPU; see docs/benchmarks.md."""
