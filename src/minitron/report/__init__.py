"""The report and the model card, from the records of a run only."""
