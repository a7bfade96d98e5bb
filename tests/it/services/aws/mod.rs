//! `aws-kms://` against `tests/support/kms_server.py`: moto with AWS's rules for key states, key ids and rotation. It
//! proves this program's side; what the service itself does is only as its documentation says.

mod cli;
mod provider;
mod wrong;

use super::kms_server::Kms;
use envelopefs::kms::aws::AwsKms;
use envelopefs::kms::services::AwsOptions;
use envelopefs::kms::{KeyProvider, KeyPurpose, KmsError, RootKeyUri, WrapContext};
use std::sync::Arc;

/// A server in a directory of its own.
struct Place {
    kms: Kms,
    _dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { kms: Kms::start(dir.path()), _dir: dir }
    }

    fn options(&self) -> AwsOptions {
        AwsOptions { endpoint: Some(self.kms.endpoint()), ..AwsOptions::default() }
    }

    /// The root key `key`, as it stands after `aws-kms://`.
    fn key(&self, key: &str) -> Arc<dyn KeyProvider> {
        open(key, self.options()).unwrap()
    }
}

/// The provider itself, without the guard around it: one attempt is one call.
fn open(key: &str, aws: AwsOptions) -> Result<Arc<dyn KeyProvider>, KmsError> {
    Ok(Arc::new(AwsKms::new(&RootKeyUri::parse(&format!("aws-kms://{key}")).unwrap(), &aws)?))
}

fn context() -> WrapContext {
    WrapContext { store: [1; 16], purpose: KeyPurpose::Dek, object: [2; 16], extra: b"a slot's prefix".to_vec() }
}
