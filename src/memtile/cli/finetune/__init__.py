"""`memtile finetune`: fine-tuning within a memory budget."""
