"""What is neither the method (train.py) nor its explanation (explain_clinicalLF.py): sources, figures, pictures."""
