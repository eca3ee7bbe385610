"""Workers of Ray Train: started, watched, told, and given back."""
