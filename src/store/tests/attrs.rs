//! Attributes, owners, times, extended attributes.

super::on_each_backing!(
    modes_times_and_sizes,
    privileges_go_when_asked,
    groups_of_setgid_directories,
    extended_attributes,
);

mod bodies {
    use super::super::{Open, errno, list};
    use crate::backing::{Access, Backing, SetTime, Timestamp, XattrMode};
    use crate::store::{Owner, SetAttr, StoreError};

    pub fn modes_times_and_sizes<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        let (n, attr, f) = s.create(&root, b"f", 0o666, 0o027, None).unwrap();
        assert_eq!((attr.mode, attr.size, attr.nlink), (0o640, 0, 1));
        f.write(0, &[1; 10_000]).unwrap();
        let t = SetTime::At(Timestamp { sec: -5, nsec: 123_456_789 });
        let set = SetAttr { mode: Some(0o1604), size: Some(5000), atime: t, mtime: t, ..SetAttr::default() };
        let attr = s.setattr(&n, &set, Some(&f)).unwrap();
        assert_eq!((attr.mode, attr.size), (0o1604, 5000));
        assert_eq!((attr.mtime.sec, attr.mtime.nsec), (-5, 123_456_789));
        assert_eq!(s.getattr(&n).unwrap(), attr);
        drop(f);
        s.settle(std::time::Duration::ZERO).unwrap();
        assert_eq!(s.getattr(&n).unwrap().mtime, attr.mtime, "closing is no change that users see");
        let grown = s.setattr(&n, &SetAttr { size: Some(9000), ..SetAttr::default() }, None).unwrap();
        assert_eq!(grown.size, 9000);
        let mut buf = vec![9; 9000];
        assert_eq!(s.open_file(&n, Access::Read).unwrap().read(0, &mut buf).unwrap(), 9000);
        assert!(buf[..5000].iter().all(|b| *b == 1) && buf[5000..].iter().all(|b| *b == 0));
        let (d, _) = s.mkdir(&root, b"d", 0o777, 0o022, None).unwrap();
        let e = s.setattr(&d, &SetAttr { size: Some(0), ..SetAttr::default() }, None);
        assert!(matches!(e, Err(StoreError::IsADirectory)));
        assert_eq!(s.setattr(&d, &SetAttr { mode: Some(0o700), ..SetAttr::default() }, None).unwrap().mode, 0o700);
        assert_eq!(s.stat_fs().unwrap().namelen, 255);
    }

    pub fn privileges_go_when_asked<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let (n, _, _) = s.create(&s.root(), b"f", 0o6755, 0, None).unwrap();
        s.setattr(&n, &SetAttr { mode: Some(0o6755), ..SetAttr::default() }, None).unwrap();
        s.setattr(&n, &SetAttr { mode: None, ..SetAttr::default() }, None).unwrap();
        assert_eq!(s.getattr(&n).unwrap().mode, 0o6755);
        let set = SetAttr { size: Some(1), kill_suidgid: true, ..SetAttr::default() };
        assert_eq!(s.setattr(&n, &set, None).unwrap().mode, 0o755);
        s.setattr(&n, &SetAttr { mode: Some(0o2644), ..SetAttr::default() }, None).unwrap();
        s.kill_privileges(&n).unwrap();
        assert_eq!(s.getattr(&n).unwrap().mode, 0o2644, "not group-executable: this is mandatory locking");
    }

    pub fn groups_of_setgid_directories<B: Backing>(open: Open<'_, B>) {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let s = open(None);
        let root = s.root();
        let owner = Some(Owner { uid: 1001, gid: 1002 });
        let (d, attr) = s.mkdir(&root, b"plain", 0o755, 0, owner).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode), (1001, 1002, 0o755));
        let (_, attr, _) = s.create(&d, b"f", 0o4755, 0, owner).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode), (1001, 1002, 0o4755));
        let (_, attr) = s.symlink(&d, b"l", b"t", owner).unwrap();
        assert_eq!((attr.uid, attr.gid), (1001, 1002));
        s.setattr(&d, &SetAttr { gid: Some(2000), ..SetAttr::default() }, None).unwrap();
        s.setattr(&d, &SetAttr { mode: Some(0o2775), ..SetAttr::default() }, None).unwrap();
        let (_, attr, _) = s.create(&d, b"g", 0o644, 0, owner).unwrap();
        assert_eq!((attr.uid, attr.gid), (1001, 2000));
        let (sub, attr) = s.mkdir(&d, b"sub", 0o700, 0, owner).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode), (1001, 2000, 0o2700));
        let (_, attr) = s.mkdir(&sub, b"readonly", 0o555, 0, owner).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode), (1001, 2000, 0o2555));
    }

    pub fn extended_attributes<B: Backing>(open: Open<'_, B>) {
        let s = open(None);
        let root = s.root();
        let (n, _, _) = s.create(&root, b"f", 0o600, 0, None).unwrap();
        let (d, _) = s.mkdir(&root, b"d", 0o700, 0, None).unwrap();
        let long = [b"user.".as_slice(), &[b'x'; 250]].concat();
        for n in [&n, &d] {
            match s.set_xattr(n, b"user.one", b"value", XattrMode::Create) {
                // A file system without them, such as an old tmpfs.
                Err(StoreError::NotSupported) => return,
                r => r.unwrap(),
            }
            assert!(matches!(s.set_xattr(n, b"user.one", b"", XattrMode::Create), Err(StoreError::Exists)));
            assert!(matches!(s.set_xattr(n, b"user.two", b"", XattrMode::Replace), Err(StoreError::NoAttribute)));
            s.set_xattr(n, b"user.empty", b"", XattrMode::Any).unwrap();
            s.set_xattr(n, &long, &[7; 100], XattrMode::Any).unwrap();
            let mut names = s.list_xattr(n).unwrap();
            names.sort();
            assert_eq!(names, [b"user.empty".to_vec(), b"user.one".to_vec(), long.clone()]);
            assert_eq!(s.get_xattr(n, b"user.one").unwrap(), b"value");
            assert_eq!(s.get_xattr(n, b"user.empty").unwrap(), b"");
            assert_eq!(s.get_xattr(n, &long).unwrap(), [7; 100]);
            let b = &s.shared().backing;
            for name in b.list_xattr(&n.fd(b).unwrap()).unwrap() {
                let text = String::from_utf8(name).unwrap();
                assert!(!text.contains("one") || text.len() > 30, "{text}");
                assert!(!text.starts_with("user.") || text.starts_with("user.envelopefs."), "{text}");
            }
            s.remove_xattr(n, b"user.one").unwrap();
            assert!(matches!(s.get_xattr(n, b"user.one"), Err(StoreError::NoAttribute)));
            assert!(matches!(s.remove_xattr(n, b"user.one"), Err(StoreError::NoAttribute)));
            assert!(matches!(s.get_xattr(n, b"system.other"), Err(StoreError::NotSupported)));
            let e = s.set_xattr(n, &[&long[..], b"y"].concat(), b"", XattrMode::Any).unwrap_err();
            assert_eq!(errno(&e), Some(libc::ERANGE));
            let e = s.set_xattr(n, b"user.big", &vec![0; 65537], XattrMode::Any).unwrap_err();
            assert_eq!(errno(&e), Some(libc::E2BIG));
        }
        assert_eq!(list(&s, &root).len(), 2);
    }
}
