"""`memtile demo`: trains a model dense and tiled, each in a worker process, and compares them."""
