"""Learn how the weights of a network are rounded, block by block, from what each block puts out."""
