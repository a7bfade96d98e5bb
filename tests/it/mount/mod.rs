//! The store on the real `/dev/fuse`, as programs see it.

mod support;

mod data;
