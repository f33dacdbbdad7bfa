"""Numbers with their spread and sample count: fidelity to the float twin, speed, and the page that shows both."""
