"""Programs around the library: benchmarks, training of the embedded model, tiny models, tools."""
