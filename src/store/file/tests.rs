//! Tests of files over a simulated disk.
