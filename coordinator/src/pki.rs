//! The fleet's own authority. What certificates mean, and how they are checked, is in `gangway_shared::pki`.
//!
//! Keys are P-256, their files have mode 0600, and nothing is ever overwritten.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use gangway_shared::pki::{Identity, Role, is_name};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

use crate::exit::Failure;
use crate::hosts::NAME_RULE;

/// Makes `ca.pem` and `ca.key` in `dir`.
pub fn init(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    std::fs::create_dir_all(dir).map_err(|e| io("make", dir, &e))?;
    let key = KeyPair::generate().map_err(broken)?;
    // Each authority has its own name: a foreign certificate is then one of an unknown issuer, not one with a bad signature.
    let tail = key.public_key_raw().iter().rev().take(4);
    let tail: String = tail.map(|b| format!("{b:02x}")).collect();
    let mut params = base(&format!("Gangway authority {tail}"), 3650)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let cert = params.self_signed(&key).map_err(broken)?;
    write_pair(&dir.join("ca"), &cert.pem(), &key.serialize_pem())
}

/// Makes `NAME.pem` and `NAME.key` in `dir`, issued by its `ca.pem`.
pub fn issue(
    dir: &Path,
    name: &str,
    role: Role,
    addresses: &[IpAddr],
) -> Result<Vec<PathBuf>, Failure> {
    if !is_name(name) || name == "ca" {
        return Err(Failure::usage(format!(
            "'{name}' cannot be a name here: {NAME_RULE}, and not 'ca'"
        )));
    }
    let read = |file: &str| {
        let path = dir.join(file);
        std::fs::read_to_string(&path).map_err(|e| {
            let f = io("read", &path, &e);
            Failure::usage(format!(
                "{}; `gangway pki init {}` makes it",
                f.message,
                dir.display()
            ))
        })
    };
    let (ca_cert, ca_key) = (read("ca.pem")?, read("ca.key")?);
    let garbage = |e: rcgen::Error| {
        Failure::usage(format!(
            "{}/ca.pem or ca.key is not what `pki init` wrote: {e}",
            dir.display()
        ))
    };
    let ca_key = KeyPair::from_pem(&ca_key).map_err(garbage)?;
    let issuer = Issuer::from_ca_cert_pem(&ca_cert, ca_key).map_err(garbage)?;

    let dns = Identity {
        name: name.to_owned(),
        role,
    }
    .dns_name();
    let mut params = base(&dns, 365)?;
    let dns_san = dns.as_str().try_into().map_err(broken)?;
    params.subject_alt_names = vec![SanType::DnsName(dns_san)];
    params
        .subject_alt_names
        .extend(addresses.iter().map(|a| SanType::IpAddress(*a)));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // A switch is both: it serves coordinators and dials the switch it ships to.
    params.extended_key_usages = match role {
        Role::Host => vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ],
        Role::Coordinator => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().map_err(broken)?;
    let cert = params.signed_by(&key, &issuer).map_err(broken)?;
    write_pair(&dir.join(name), &cert.pem(), &key.serialize_pem())
}

fn base(common_name: &str, days: i64) -> Result<CertificateParams, Failure> {
    let mut params = CertificateParams::new(Vec::<String>::new()).map_err(broken)?;
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    let now = time::OffsetDateTime::now_utc();
    // An hour back: clocks differ.
    params.not_before = now - time::Duration::hours(1);
    params.not_after = now + time::Duration::days(days);
    Ok(params)
}

fn broken(e: rcgen::Error) -> Failure {
    Failure::failed(format!("the certificate cannot be made: {e}"))
}

fn io(what: &str, path: &Path, e: &std::io::Error) -> Failure {
    Failure::usage(format!("cannot {what} {}: {e}", path.display()))
}

fn write_pair(stem: &Path, cert: &str, key: &str) -> Result<Vec<PathBuf>, Failure> {
    let with = |ext: &str| PathBuf::from(format!("{}.{ext}", stem.display()));
    let (cert_path, key_path) = (with("pem"), with("key"));
    for p in [&cert_path, &key_path] {
        if p.exists() {
            return Err(Failure::usage(format!(
                "{} is already there and is not overwritten; remove it first",
                p.display()
            )));
        }
    }
    let write = |path: &Path, text: &str, mode: u32| {
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)
            .and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()))
            .map_err(|e| io("write", path, &e))
    };
    write(&key_path, key, 0o600)?;
    write(&cert_path, cert, 0o644)?;
    Ok(vec![cert_path, key_path])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use gangway_shared::config::valid::TlsFiles;
    use gangway_shared::pki::Credentials;
    use rustls::pki_types::UnixTime;

    use super::*;

    #[test]
    fn issues_what_the_client_can_use_and_never_overwrites() {
        let dir = tempfile::tempdir().expect("tempdir");
        let d = dir.path();
        assert!(
            issue(d, "a", Role::Host, &[])
                .expect_err("no ca")
                .message
                .contains("pki init")
        );
        init(d).expect("init");
        assert!(
            init(d)
                .expect_err("again")
                .message
                .contains("not overwritten")
        );
        issue(d, "a", Role::Host, &["10.0.0.1".parse().expect("ip")]).expect("host");
        issue(d, "me", Role::Coordinator, &[]).expect("coordinator");
        assert!(issue(d, "../x", Role::Host, &[]).is_err());
        assert!(issue(d, "ca", Role::Host, &[]).is_err());
        let mode = std::fs::metadata(d.join("me.key"))
            .expect("key")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let files = |cert: &str, key: &str| TlsFiles {
            cert: d.join(cert),
            key: d.join(key),
            ca: d.join("ca.pem"),
        };
        let now = UnixTime::now();
        let me = Credentials::load(&files("me.pem", "me.key"), now).expect("the coordinator's");
        assert_eq!(me.identity().to_string(), "coordinator 'me'");
        let a = Credentials::load(&files("a.pem", "a.key"), now).expect("the host's");
        assert_eq!(a.identity().dns_name(), "a.host.gangway");
        assert!(
            Credentials::load(&files("me.pem", "a.key"), now).is_err(),
            "a key of another certificate"
        );
    }
}
