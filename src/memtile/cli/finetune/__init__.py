"""Fine-tuning within a budget of memory: what `memtile finetune` does."""
