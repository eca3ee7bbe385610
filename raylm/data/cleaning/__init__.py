"""What is changed in documents and what is dropped: rules, filters, duplicates, decontamination."""
