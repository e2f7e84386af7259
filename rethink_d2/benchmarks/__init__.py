"""Speed against stock Detectron2, both measured in one run; see docs/benchmarks.md."""
