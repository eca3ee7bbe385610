"""The plan over workers and the DeepSpeed engine behind one train_step."""
