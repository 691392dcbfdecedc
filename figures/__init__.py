"""One file a figure: a draw function from records to PDF and PNG, and a main."""
