//! Figures for monitoring, as Prometheus text 0.0.4: over the control socket, and on a loopback port if asked.
//!
//! | module | what it does | I/O |
//! |---|---|---|
//! | [`text`] | the exposition format | none |
//! | [`deks`] | counts uses of DEKs | none |
//! | [`page`] | all figures of a mounted store, as text | none |
//! | [`source`] | where they come from | none |
//! | [`http`] | what a request gets | none |
//! | [`listen`] | the port | yes |

pub mod deks;
pub mod http;
pub mod listen;
pub mod page;
pub mod source;
pub mod text;
