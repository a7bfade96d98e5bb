//! Integration tests, in one binary so that they link once. The names of the modules say what is tested.

mod cli;
mod golden;
mod mount;
mod scale;
mod services;
mod store_model;
mod tamper;
mod vectors;
