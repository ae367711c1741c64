"""One new token of each sequence: a compiled step that reads only the weights of chosen experts."""
