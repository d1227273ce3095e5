"""The demo: a real model trained dense and tiled, side by side; one worker process for each."""
