//! The store on the real `/dev/fuse`, as programs see it.

mod support;

mod cache;
mod data;
mod directories;
mod lock;
mod locks;
mod names;
mod scale;
mod space;
mod times;
mod users;
