"""How weights lie in memory, in float or in 8 bits, and their products with a few vectors."""
