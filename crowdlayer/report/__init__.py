"""What a run leaves behind: the results, tables, pictures and pages made of them."""
