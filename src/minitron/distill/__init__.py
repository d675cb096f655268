"""Teaching the student: losses on logits and the training loop."""
