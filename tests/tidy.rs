//! House rules that a compiler does not hold: layers, sizes, banned constructs, and documents that agree with the code.
//!
//! Every check collects all it finds and names file and line, so that one run shows everything.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers in order. A module imports only from those before it (and from itself).
const LAYERS: [&str; 10] = ["crypto", "format", "kms", "backing", "store", "rotation", "fs", "fuse", "daemon", "cli"];
/// Edges that the order allows and the design does not: (from, to).
const FORBIDDEN_EDGES: [(&str, &str); 6] = [
    ("fs", "rotation"),
    ("fuse", "rotation"),
    // The doorway to the ciphertext directory knows no keys.
    ("backing", "crypto"),
    ("backing", "format"),
    ("backing", "kms"),
    // The adapter decides nothing, so it has nothing to ask of those.
    ("fuse", "crypto"),
];
/// Where the machine's own file system may be touched other than through `backing::Backing`.
const STD_FS_ALLOWED: [&str; 9] = [
    "backing/posix",
    "kms/keyfile",
    "kms/passphrase",
    // The credentials file that the configuration names.
    "kms/gcp/credentials",
    // Tokens, secret ids and certificates that the configuration names.
    "kms/vault/files",
    "daemon/",
    "cli/",
    "cli.rs",
    "fuse/",
];
/// Longest module, in lines without its tests.
const MODULE_LINES_MAX: usize = 600;

struct Source {
    /// Path below `src/`.
    path: String,
    /// The file without its `#[cfg(test)]` module.
    code: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All files below `dir` (relative to the repository) for which `keep` holds, sorted.
fn files(dir: &str, keep: &dyn Fn(&Path) -> bool) -> Vec<PathBuf> {
    fn walk(dir: &Path, keep: &dyn Fn(&Path) -> bool, out: &mut Vec<PathBuf>) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        for e in entries.flatten() {
            let path = e.path();
            let name = e.file_name();
            if path.is_dir() {
                if name != "target"
                    && name != ".git"
                    && name != "__pycache__"
                    && name != "corpus"
                    && name != "artifacts"
                {
                    walk(&path, keep, out);
                }
            } else if keep(&path) {
                out.push(path);
            }
        }
    }
    let mut out = Vec::new();
    walk(&root().join(dir), keep, &mut out);
    out.sort();
    out
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let texts: Vec<(PathBuf, String)> = files("src", &|p| p.extension().is_some_and(|e| e == "rs"))
        .into_iter()
        .map(|p| {
            let text = fs::read_to_string(&p).expect("a source file is readable");
            (p, text)
        })
        .collect();
    let tests: Vec<PathBuf> = texts.iter().flat_map(|(p, text)| test_modules(p, text)).collect();
    let all: Vec<Source> = texts
        .iter()
        .filter(|(p, _)| !tests.iter().any(|t| *p == t.with_extension("rs") || p.starts_with(t)))
        .map(|(p, text)| {
            let path = p.strip_prefix(&src).expect("below src").to_string_lossy().into_owned();
            Source { path, code: without_tests(text).to_owned() }
        })
        .collect();
    assert!(all.len() > 20, "the sources were not found");
    all
}

/// Where the modules lie that this file declares for tests only, without extension.
fn test_modules(file: &Path, text: &str) -> Vec<PathBuf> {
    let folder = if file.ends_with("mod.rs") || file.ends_with("lib.rs") {
        file.parent().expect("a file has a parent").to_owned()
    } else {
        file.with_extension("")
    };
    text.split("#[cfg(test)]\nmod ")
        .skip(1)
        .filter_map(|rest| rest.split_once(';').map(|(name, _)| name))
        .filter(|name| name.chars().all(|c| c.is_alphanumeric() || c == '_'))
        .map(|name| folder.join(name))
        .collect()
}

/// The text up to the test module, which stands last in a file.
fn without_tests(text: &str) -> &str {
    let starts = |(at, found): (usize, &str)| {
        let head = text.get(at + found.len()..)?.lines().next()?;
        head.ends_with('{').then_some(at)
    };
    let at = text.match_indices("\n#[cfg(test)]\nmod ").find_map(starts);
    at.map_or(text, |at| text.get(..at).expect("a match starts at a boundary"))
}

/// Lines of code as (number, text), comments left out.
fn code_lines(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//")).map(|(i, l)| (i + 1, l))
}

fn fail_on(found: Vec<String>) {
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

/// The crate modules that `code` names: `crate::x`, and the members of `crate::{x::…, y}`.
fn modules_named(code: &str) -> Vec<(usize, String)> {
    let mut out = Vec::new();
    for prefix in ["crate::", "envelopefs::"] {
        for (at, _) in code.match_indices(prefix) {
            let before = code.get(..at).expect("a match starts at a boundary");
            let line = before.matches('\n').count() + 1;
            let in_comment = before.rsplit('\n').next().is_some_and(|l| l.contains("//"));
            if in_comment || before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':' || c == '$') {
                continue;
            }
            let rest = code.get(at + prefix.len()..).expect("a match ends at a boundary");
            out.extend(heads(rest).into_iter().map(|m| (line, m)));
        }
    }
    out
}

/// First path segments of a use tree.
fn heads(tree: &str) -> Vec<String> {
    let ident = |s: &str| s.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(group) = tree.strip_prefix('{') else { return vec![ident(tree)] };
    let (mut depth, mut start, mut out) = (0usize, 0usize, Vec::new());
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                out.push(ident(&group[start..i]));
                start = i + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    out.retain(|m| !m.is_empty());
    out
}

#[test]
fn use_trees_are_read() {
    assert_eq!(heads("format::ids::X;"), ["format"]);
    assert_eq!(heads("{crypto::{a, b}, format::c,\n    kms};"), ["crypto", "format", "kms"]);
    let code = "use crate::store::X;\n// crate::cli is not meant\nlet a = crate::fs::f();\n$crate::kms::z";
    assert_eq!(modules_named(code), [(1, "store".to_owned()), (3, "fs".to_owned())]);
}

#[test]
fn modules_import_only_from_layers_above() {
    let rank = |m: &str| LAYERS.iter().position(|l| *l == m);
    let mut found = Vec::new();
    let mut edges = 0;
    for s in sources() {
        let own = s.path.split('/').next().unwrap_or_default().trim_end_matches(".rs");
        if own == "lib" || own == "main" {
            continue;
        }
        let Some(from) = rank(own) else {
            found.push(format!("src/{}: module {own} is in no layer", s.path));
            continue;
        };
        for (line, module) in modules_named(&s.code) {
            let Some(to) = rank(&module) else { continue };
            edges += usize::from(to != from);
            if to > from || FORBIDDEN_EDGES.contains(&(own, module.as_str())) {
                found.push(format!("src/{}:{line}: {own} must not import from {module}", s.path));
            }
        }
    }
    assert!(edges > 0, "no import was recognised");
    fail_on(found);
}

#[test]
fn every_module_says_what_it_is() {
    let mut found = Vec::new();
    for s in sources() {
        if s.path != "main.rs" && !s.code.starts_with("//!") {
            found.push(format!("src/{}: does not open with //!", s.path));
        }
        if s.code.starts_with("//! To come") {
            found.push(format!("src/{}: still a placeholder", s.path));
        }
    }
    fail_on(found);
}

#[test]
fn modules_are_small() {
    let long = |s: &Source| (s.code.lines().count() > MODULE_LINES_MAX).then(|| s.code.lines().count());
    fail_on(sources().iter().filter_map(|s| long(s).map(|n| format!("src/{}: {n} lines", s.path))).collect());
}

#[test]
fn no_unfinished_or_panicking_code() {
    let banned = ["todo!(", "unimplemented!(", "dbg!(", ".unwrap()", "panic!(", "FIXME", "XXX"];
    let mut found = Vec::new();
    for s in sources() {
        for (line, text) in code_lines(&s.code) {
            for b in banned.iter().filter(|b| text.contains(**b)) {
                found.push(format!("src/{}:{line}: {b}", s.path));
            }
        }
    }
    fail_on(found);
}

#[test]
fn unsafe_code_says_why_it_is_sound() {
    let mut found = Vec::new();
    for s in sources() {
        let lines: Vec<&str> = s.code.lines().collect();
        for (i, text) in lines.iter().enumerate() {
            let code = text.split("//").next().unwrap_or_default();
            if !(code.contains("unsafe {") || code.contains("unsafe impl")) {
                continue;
            }
            let explained = lines[i.saturating_sub(6)..=i].iter().any(|l| l.contains("SAFETY:"));
            if !explained {
                found.push(format!("src/{}:{}: unsafe without // SAFETY:", s.path, i + 1));
            }
        }
    }
    fail_on(found);
}

#[test]
fn the_ciphertext_directory_has_one_doorway() {
    let mut found = Vec::new();
    for s in sources() {
        if s.path == "main.rs" || STD_FS_ALLOWED.iter().any(|a| s.path.starts_with(a)) {
            continue;
        }
        for (line, text) in code_lines(&s.code) {
            if ["std::fs", "std::{fs", "rustix::fs::"].iter().any(|b| text.contains(b)) {
                found.push(format!("src/{}:{line}: file system access outside backing::posix", s.path));
            }
        }
    }
    fail_on(found);
}

#[test]
fn nothing_names_the_place_it_was_written_at() {
    // Put together here so that this file does not find itself.
    let banned: Vec<String> = [
        ["/wo", "rk/"],
        ["/tm", "p/w/"],
        ["index.crates", ".io"],
        ["static.crates", ".io"],
        ["pypi", ".org"],
        ["pythonhosted", ".org"],
        ["deb.debian", ".org"],
        ["registry.npmjs", ".org"],
        ["language ", "model"],
        ["Clau", "de"],
        ["Open", "AI"],
    ]
    .iter()
    .map(|p| p.concat())
    .collect();
    let keep = |p: &Path| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        name != "Cargo.lock" && name != ".git" && !name.ends_with(".bin")
    };
    let mut found = Vec::new();
    for path in files(".", &keep) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (i, line) in text.lines().enumerate() {
            for b in banned.iter().filter(|b| names(line, b)) {
                found.push(format!("{}:{}: {b}", path.display(), i + 1));
            }
        }
    }
    fail_on(found);
}

/// Whether `line` holds `word`, not as the end of a longer word.
fn names(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line.get(..at).and_then(|b| b.chars().next_back());
        before.is_none_or(|c| !c.is_alphanumeric())
    })
}

#[test]
fn the_changelog_has_its_form() {
    let text = read("CHANGELOG.md");
    let mut found = Vec::new();
    if !text.starts_with("# Changelog\n") || !text.contains("\n## [Unreleased]\n") {
        found.push("CHANGELOG.md: title or [Unreleased] missing".to_owned());
    }
    let kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"];
    for (i, line) in text.lines().enumerate() {
        let ok = match (line.strip_prefix("## "), line.strip_prefix("### ")) {
            (Some("[Unreleased]"), _) => true,
            (Some(version), _) => is_release_heading(version),
            (_, Some(kind)) => kinds.contains(&kind),
            _ => true,
        };
        if !ok {
            found.push(format!("CHANGELOG.md:{}: {line}", i + 1));
        }
    }
    fail_on(found);
}

/// `[1.2.3] - 2026-01-31`
fn is_release_heading(text: &str) -> bool {
    let Some((version, date)) = text.strip_prefix('[').and_then(|t| t.split_once("] - ")) else { return false };
    let numbers = |s: &str, sep: char, n: usize| {
        let parts: Vec<&str> = s.split(sep).collect();
        parts.len() == n && parts.iter().all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
    };
    numbers(version, '.', 3) && numbers(date, '-', 3)
}

/// String literals of `text` that come right after `marker`.
fn literals_after<'a>(text: &'a str, marker: &str) -> BTreeSet<&'a str> {
    text.lines().filter_map(|l| l.split_once(marker)?.1.split('"').next()).collect()
}

#[test]
fn the_format_document_lists_every_damage_code_and_key_label() {
    let format = read("docs/FORMAT.md");
    let codes = read("src/format/damage.rs");
    let codes = literals_after(&codes, "=> \"");
    let labels = read("src/crypto/kdf.rs");
    let labels = literals_after(&labels, "&str = \"");
    assert!(codes.len() > 20 && labels.len() > 10, "the tables were not found");
    let missing = |set: &BTreeSet<&str>| {
        set.iter().filter(|c| !format.contains(&format!("`{c}`"))).map(|c| (*c).to_owned()).collect::<Vec<_>>()
    };
    fail_on([missing(&codes), missing(&labels)].concat());
}

/// Names of all test functions of the crate and of `tests/`, Rust and Python.
fn test_names() -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    let keep = |p: &Path| p.extension().is_some_and(|e| e == "rs" || e == "py");
    for path in files("src", &keep).into_iter().chain(files("tests", &keep)) {
        let text = fs::read_to_string(&path).expect("a source file is readable");
        // Bodies of tests that run on several backings are public in their module.
        let bodies = text.contains("on_each_backing!(");
        for line in text.lines() {
            let line = line.trim_start();
            let line = if bodies { line.trim_start_matches("pub ") } else { line };
            if let Some(rest) = line.strip_prefix("fn ").or_else(|| line.strip_prefix("def ")) {
                out.insert(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
            }
        }
    }
    out
}

/// Every claim of `docs/SEMANTICS.md` and `docs/THREAT_MODEL.md` names its test as `test: name` in backquotes.
#[test]
fn tests_named_in_documents_exist() {
    let have = test_names();
    let mut found = Vec::new();
    let mut named = 0;
    for doc in ["docs/SEMANTICS.md", "docs/THREAT_MODEL.md"] {
        for (i, line) in read(doc).lines().enumerate() {
            for rest in line.split("`test:").skip(1) {
                let name = rest.split('`').next().unwrap_or_default().trim();
                named += 1;
                if !have.contains(name) {
                    found.push(format!("{doc}:{}: no test {name}", i + 1));
                }
            }
        }
    }
    assert!(named > 0, "no document names a test");
    fail_on(found);
}

/// Relative links of the documents lead somewhere.
#[test]
fn links_between_documents_lead_somewhere() {
    let mut found = Vec::new();
    for path in files(".", &|p| p.extension().is_some_and(|e| e == "md")) {
        let text = fs::read_to_string(&path).expect("a document is readable");
        for (i, line) in text.lines().enumerate() {
            for rest in line.split("](").skip(1) {
                let target = rest.split([')', '#']).next().unwrap_or_default();
                let local = !target.is_empty() && !target.contains("://");
                if local && !path.parent().expect("a file has a parent").join(target).exists() {
                    found.push(format!("{}:{}: {target}", path.display(), i + 1));
                }
            }
        }
    }
    fail_on(found);
}
