//! Where a token's PIN comes from.

use super::matching::{Identity, escaped};
use crate::kms::passphrase::{Passphrase, ask_on_terminal, credential, read};
use crate::kms::services::Pkcs11Options;
use crate::kms::{KmsError, PassphraseSource, RootKeyUri};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

/// The systemd credential looked for when nothing else says where the PIN is.
pub const CREDENTIAL: &str = "envelopefs.pkcs11-pin";
const NO_TERMINAL: &str = "no terminal to ask on; add ?pin-source=file:/PATH to the root key, or set pin_file or pin_command in [services.pkcs11]";

/// A source of the PIN. What a person typed is kept, in secret memory, for when the token ends the login; what can be read
/// again is read again.
pub struct Pin {
    source: PassphraseSource,
    kept: Option<Passphrase>,
}

impl Pin {
    /// Where the PIN for `uri` comes from. Reads nothing yet.
    ///
    /// # Errors
    /// [`KmsError::Config`] if that is said in a way that cannot be followed.
    pub fn new(uri: &RootKeyUri, o: &Pkcs11Options) -> Result<Self, KmsError> {
        let there = credential(CREDENTIAL).is_some_and(|p| p.exists());
        let source = source(uri.pin_source(), o, there).map_err(|why| KmsError::Config(format!("{uri}: {why}")))?;
        Ok(Self { source, kept: None })
    }

    /// The PIN for `token`.
    ///
    /// # Errors
    /// [`KmsError::Credentials`] if there is none to be had.
    pub fn get(&mut self, token: &Identity) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        if let Some(kept) = &self.kept {
            return Ok(kept.assemble());
        }
        let asks = matches!(self.source, PassphraseSource::Terminal);
        let found = if asks { read(&prompt(token), false) } else { read(&self.source, false) };
        let pin = found.map_err(|why| KmsError::Credentials(format!("PIN of {token}: {why}")))?;
        let text = pin.assemble();
        self.kept = asks.then_some(pin);
        Ok(text)
    }

    /// Forgets what was typed.
    pub fn forget(&mut self) {
        self.kept = None;
    }
}

fn prompt(token: &Identity) -> PassphraseSource {
    let text = format!("PIN of token '{}': ", escaped(token.label.as_bytes()));
    PassphraseSource::Prompt(Arc::new(move |_| ask_on_terminal(&text, NO_TERMINAL)))
}

/// Decides; `credential`: systemd gave us one.
fn source(pin_source: Option<&str>, o: &Pkcs11Options, credential: bool) -> Result<PassphraseSource, &'static str> {
    if let Some(text) = pin_source {
        let path = text.strip_prefix("file:").unwrap_or(text);
        let path = path.strip_prefix("//").unwrap_or(path);
        return match Path::new(path).is_absolute() {
            true => Ok(PassphraseSource::File(path.into())),
            false => Err("pin-source is file:/PATH; for a command set pin_command in [services.pkcs11]"),
        };
    }
    match (&o.pin_file, &o.pin_command) {
        (Some(_), Some(_)) => Err("pin_file and pin_command are both set in [services.pkcs11]; leave one out"),
        (Some(f), None) if !f.is_absolute() => Err("pin_file in [services.pkcs11] has to be an absolute path"),
        (Some(f), None) => Ok(PassphraseSource::File(PathBuf::clone(f))),
        (None, Some(c)) => Ok(PassphraseSource::Command(c.clone())),
        (None, None) if credential => Ok(PassphraseSource::SystemdCredential(CREDENTIAL.into())),
        (None, None) => Ok(PassphraseSource::Terminal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The source in words; `Debug` of the real one says nothing, on purpose.
    fn chosen(pin_source: Option<&str>, o: &Pkcs11Options, credential: bool) -> Result<String, &'static str> {
        source(pin_source, o, credential).map(|s| match s {
            PassphraseSource::File(p) => format!("file {}", p.display()),
            PassphraseSource::Command(c) => format!("command {c}"),
            PassphraseSource::SystemdCredential(c) => format!("credential {c}"),
            other => format!("{other:?}"),
        })
    }

    #[test]
    fn the_nearest_source_wins() {
        let none = Pkcs11Options::default();
        let file = Pkcs11Options { pin_file: Some("/f".into()), ..Default::default() };
        let command = Pkcs11Options { pin_command: Some("c".into()), ..Default::default() };
        let both = Pkcs11Options { pin_command: Some("c".into()), ..file.clone() };
        for (uri, o, credential, found) in [
            (Some("file:/p"), &both, true, "file /p"),
            (Some("file:///p"), &none, false, "file /p"),
            (Some("/p"), &none, false, "file /p"),
            (None, &file, true, "file /f"),
            (None, &command, true, "command c"),
            (None, &none, true, "credential envelopefs.pkcs11-pin"),
            (None, &none, false, "Terminal"),
        ] {
            assert_eq!(chosen(uri, o, credential).unwrap(), found);
        }
        assert!(chosen(None, &both, false).is_err());
        for bad in ["p", "file:p", "|cat /p", "https://host/p", "file:"] {
            assert!(chosen(Some(bad), &none, false).is_err(), "{bad}");
        }
        let relative = Pkcs11Options { pin_file: Some("f".into()), ..Default::default() };
        assert!(chosen(None, &relative, false).is_err());
    }

    #[test]
    fn a_pin_that_can_be_read_again_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pin");
        let mut pin = Pin { source: PassphraseSource::File(path.clone()), kept: None };
        let token = Identity { label: "t".into(), ..Default::default() };
        let e = pin.get(&token).unwrap_err();
        assert!(matches!(&e, KmsError::Credentials(m) if m.starts_with("PIN of token=t;serial=: ")), "{e}");
        for text in ["first", "second"] {
            std::fs::write(&path, format!("{text}\n")).unwrap();
            assert_eq!(*pin.get(&token).unwrap(), text.as_bytes());
        }
        assert!(pin.kept.is_none());
    }
}
