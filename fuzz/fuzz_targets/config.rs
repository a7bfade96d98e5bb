//! What people write: the configuration file and root key URIs. Any text parses or is refused; a URI's canonical text
//! is its own canonical text.
#![no_main]

use envelopefs::cli::config;
use envelopefs::kms::RootKeyUri;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = config::parse(text);
    if let Ok(uri) = RootKeyUri::parse(text) {
        let canonical = uri.to_string();
        // Asks for a new key: a keyring records which.
        if canonical == "recovery:" {
            return;
        }
        let again = RootKeyUri::recorded(&canonical).expect("the canonical text is accepted from a keyring");
        assert_eq!(again.to_string(), canonical);
    }
});
