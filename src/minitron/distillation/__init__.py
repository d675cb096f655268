"""Teaching the student: distillation of the teacher into it."""
