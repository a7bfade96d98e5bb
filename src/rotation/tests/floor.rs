//! A store with a floor: what is below it is refused, and a rotation moves it up.

use super::*;
use crate::format::damage::Damage;
use crate::store::StoreError;

#[test]
fn files_below_the_floor_are_refused_at_once_and_a_rotation_moves_them_up() {
    let (disk, root, tree) = filled();
    let path = content_files(&disk).remove(0);
    let saved = disk.read_raw(&path).unwrap()[..2048].to_vec();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    rotate(&store, &one_job()).unwrap();
    let new = active(&store.shared().keys);
    disk.write_raw(&path, 0, &saved).unwrap();
    assert_eq!(read_all(&store), tree, "the DEK is in the cache now");
    let below = |store: &Arc<Store<SimDisk>>| {
        let files = tree.keys().map(|p| {
            let (parent, name) = split(p);
            store.lookup(&dir(store, parent), name.as_bytes()).unwrap().0
        });
        let refused = |r| matches!(r, Err(StoreError::Damage(Damage::KekBelowFloor(id))) if id == old);
        files.filter(|f| refused(read(store, f))).count()
    };
    assert_eq!(below(&store), 0);
    store.shared().keys.set_floor(&disk, Some(new)).unwrap();
    store.forget_idle_keys();
    assert!(below(&store) >= 1, "whatever is in the cache");
    let again = open(disk.clone(), &root);
    assert!(below(&again) >= 1);
    assert!(again.shared().restored.is_empty(), "nothing is moved behind the back of whoever rehearses");
    again.shared().keys.set_floor(&disk, None).unwrap();
    assert_eq!(below(&again), 0, "as if nothing had been");
    again.shared().keys.set_floor(&disk, Some(new)).unwrap();
    let report = rotate(&again, &one_job()).unwrap();
    assert_eq!((report.outcome, report.failures_total), (Outcome::Complete, 0));
    assert_eq!(read_all(&again), tree);
}
