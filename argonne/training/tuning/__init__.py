"""Instruction tuning: the workflow of pretraining, with conversations for its source of batches."""
