"""Graph passes: each says what it requires, does one thing, and checks what it did."""
