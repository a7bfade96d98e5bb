//! Files with content and zeros in place of a header, as a power cut leaves a new one that nobody has synced.

use super::destroy::{destroy, has_wraps};
use super::*;
use crate::backing::sim::PowerCut;
use crate::format::geometry::PAGE;
use crate::format::names::Listed;
use crate::rotation::waive::Waivers;
use std::sync::atomic::{AtomicBool, Ordering};

/// A filled store after a power cut that took the first page of a new file and, since its name is long, the file that has
/// the rest of it: the disk, its root key, what was synced, and the path.
fn after_a_power_cut() -> (SimDisk, Arc<Scripted>, Tree, Vec<u8>) {
    let (disk, root, tree) = filled();
    let before: BTreeSet<_> = disk.files().into_iter().collect();
    write(&open(disk.clone(), &root), &format!("d/{}", "new".repeat(70)), &pattern(3 * 4096, 9));
    for seed in 0..2000 {
        let cut = disk.crash_power(seed, PowerCut::Reorder { tear: false });
        let files = cut.files();
        let has_lost_all = |p: &Vec<u8>| {
            let raw = cut.read_raw(p).unwrap();
            let name = p.rsplit(|c| *c == b'/').next().unwrap();
            let sidecar = cut.read_raw([&p[..], b".name"].concat()).unwrap_or_default();
            crate::format::names::classify(name) == Listed::Long
                && raw.len() > PAGE as usize
                && raw[..PAGE as usize].iter().all(|b| *b == 0)
                && sidecar.iter().all(|b| *b == 0)
        };
        if let Some(path) = files.iter().find(|p| !before.contains(*p) && has_lost_all(p)) {
            return (cut.clone(), root, tree, path.clone());
        }
    }
    panic!("no power cut leaves such a file");
}

fn text(path: &[u8]) -> &str {
    std::str::from_utf8(path).unwrap()
}

/// It was a failure of every rotation from then on, until somebody removed or waived it.
#[test]
fn a_new_file_that_a_power_cut_took_does_not_keep_a_rotation_from_its_end() {
    let (disk, root, tree, path) = after_a_power_cut();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    let report = rotate(&store, &one_job()).unwrap();
    assert_eq!((report.outcome, report.failures_total), (Outcome::Complete, 0), "{report:?}");
    assert_eq!(report.retired, [old]);
    // It is told, and counted for nothing that was proved.
    assert_eq!(report.no_header, [text(&path)]);
    let v = report.verify.unwrap();
    assert_eq!((v.scanned, v.current, v.empty, v.no_header, v.failed), (7, 5, 1, 1, 0));
    assert_eq!((report.sweep.no_header, report.sweep.failed), (1, 0));
    assert!(report.waived.is_empty());
    assert_eq!(keks_named(&disk), BTreeSet::from([report.target]));
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn zeros_alone_are_no_header() {
    let (disk, root, _) = filled();
    let path = content_files(&disk).remove(0);
    let whole = disk.read_raw(&path).unwrap();
    // One bit anywhere in the slots, and it is something that was damaged.
    for at in [0, 7, 1023, 1024, 2047] {
        disk.write_raw(&path, 0, &[0; 2048]).unwrap();
        disk.flip_bit(&path, at, 0).unwrap();
        let report = rotate(&open(disk.clone(), &root), &one_job()).unwrap();
        assert_eq!((report.outcome, report.no_header.len()), (Outcome::Incomplete, 0), "{at}");
        assert_eq!(report.failures[0].code, "header-magic", "{at}");
    }
    // Without content nothing is lost: an empty file, as it always was.
    disk.replace_raw(&path, &[0; PAGE as usize]).unwrap();
    let report = rotate(&open(disk.clone(), &root), &one_job()).unwrap();
    let v = report.verify.unwrap();
    assert_eq!((report.outcome, v.no_header, v.empty), (Outcome::Complete, 0, 2));
    disk.replace_raw(&path, &whole).unwrap();
    let report = rotate(&open(disk.clone(), &root), &one_job()).unwrap();
    assert_eq!((report.outcome, report.verify.unwrap().empty), (Outcome::Complete, 1));
}

/// If it was the disk that lost the header, a backup under an old KEK is all there is of the file.
#[test]
fn no_kek_is_destroyed_while_a_backup_may_be_all_there_is_of_a_file() {
    let (disk, root, tree) = filled();
    let path = content_files(&disk).remove(0);
    let backup = disk.read_raw(&path).unwrap();
    disk.write_raw(&path, 0, &[0; 4096]).unwrap();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    let destroying = Options { destroy_old: true, ..one_job() };
    let report = rotate(&store, &destroying).unwrap();
    assert_eq!((report.outcome, &report.kept[..]), (Outcome::Complete, &[old][..]), "{report:?}");
    let why = destroy(&store, old).unwrap_err().to_string();
    let shown = text(&path);
    assert!(
        why.contains(&format!("1 file has content and no header: {shown}; if the disk lost it, only a backup")),
        "{why}"
    );
    assert!(has_wraps(&disk, old));
    // As it says.
    drop(store);
    disk.replace_raw(&path, &backup).unwrap();
    let store = open(disk.clone(), &root);
    let report = rotate(&store, &destroying).unwrap();
    assert_eq!((report.outcome, report.kept.len(), report.no_header.len()), (Outcome::Complete, 0, 0));
    assert!(!has_wraps(&disk, old));
    assert_eq!(read_all(&open(disk, &root)), tree);
}

#[test]
fn whoever_answers_for_it_or_removes_it_has_the_old_kek_destroyed() {
    let (disk, root, tree, path) = after_a_power_cut();
    let destroying = Options { destroy_old: true, ..one_job() };
    let waive = Arc::new(Waivers::new([text(&path)]).unwrap());
    let waived = disk.crash_process();
    let report = rotate(&open(waived.clone(), &root), &Options { waive, ..destroying.clone() }).unwrap();
    assert_eq!((report.outcome, report.destroyed.len(), report.kept.len()), (Outcome::Complete, 1, 0), "{report:?}");
    assert_eq!((report.waived[0].code.as_str(), report.no_header.len()), ("header-magic", 0));
    assert_eq!(read_all(&open(waived, &root)), tree);
    let (parent, name) = split(text(&path));
    let parent = parent.split('/').fold(disk.root().unwrap(), |at, name| disk.lookup(&at, name.as_bytes()).unwrap());
    disk.unlink(&parent, name.as_bytes()).unwrap();
    let report = rotate(&open(disk.clone(), &root), &destroying).unwrap();
    assert_eq!((report.outcome, report.destroyed.len(), report.kept.len()), (Outcome::Complete, 1, 0), "{report:?}");
    assert_eq!(read_all(&open(disk, &root)), tree);
}

/// The page cache holds as if it were clean what never got to the disk. The file was told as one whose header is lost, to be
/// removed or put back, while it could be read, and saved by writing it once more.
#[test]
fn a_header_that_only_the_page_cache_has_is_written_again() {
    let (disk, root, tree) = filled();
    let store = open(disk.clone(), &root);
    let old = active(&store.shared().keys);
    rotate(&store, &one_job()).unwrap();
    let path = content_files(&disk).remove(0);
    disk.fail_writeback(&path, 0).unwrap();
    // Nothing says so but a look at the disk, and nothing is destroyed before it is there again.
    let dry = rotate(&store, &Options { dry_run: true, ..one_job() }).unwrap();
    assert_eq!((dry.verify.unwrap().no_header, &dry.no_header[..]), (1, &[text(&path).to_owned()][..]));
    assert!(destroy(&store, old).unwrap_err().to_string().contains("has content and no header"));
    // The sweep moves it to the new KEK, and its page is lost again, once.
    let (destroying, seen) = (Options { destroy_old: true, ..one_job() }, AtomicBool::new(false));
    let report = rotate_with(&store, &destroying, |s| {
        if s.state == State::Verifying && !seen.swap(true, Ordering::Relaxed) {
            disk.fail_writeback(&path, 0).unwrap();
        }
    })
    .unwrap();
    assert_eq!((report.outcome, report.no_header.len(), report.verify.unwrap().no_header), (Outcome::Complete, 0, 0));
    assert_eq!((report.passes, report.verify.unwrap().current), (4, 5), "swept and scanned twice: {report:?}");
    assert!(report.kept.is_empty() && report.destroyed.contains(&old));
    // What is on the disk now is enough.
    drop(store);
    let cut = disk.crash_power(1, PowerCut::Reorder { tear: false });
    assert_eq!(read_all(&open(cut, &root)), tree);
}
