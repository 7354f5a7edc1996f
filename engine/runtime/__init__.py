"""Device, precision, threads, memory; eager, compiled and recorded execution."""
