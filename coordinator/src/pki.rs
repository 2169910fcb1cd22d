//! The fleet's own authority. What certificates mean, and how they are checked, is in `gangway_shared::pki`.
//!
//! Keys are P-256, their files have mode 0600, and nothing is ever overwritten but `ca.crl`: the list of what is in
//! `revoked/`, made anew by each revocation.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use gangway_shared::pki::{Identity, Role, is_name, serial};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::exit::Failure;
use crate::hosts::NAME_RULE;

/// Makes `ca.pem`, `ca.key` and an empty `ca.crl` in `dir`.
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
    let mut made = write_pair(&dir.join("ca"), &cert.pem(), &key.serialize_pem())?;
    made.push(write_list(dir)?);
    Ok(made)
}

/// Makes `NAME.pem` and `NAME.key` in `dir`, issued by its `ca.pem`.
pub fn issue(
    dir: &Path,
    name: &str,
    role: Role,
    addresses: &[IpAddr],
) -> Result<Vec<PathBuf>, Failure> {
    check_name(name)?;
    let issuer = authority(dir)?;
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

/// `NAME.pem` of `dir` counts no more: it goes to `revoked/`, its key is deleted, and it is in `ca.crl` from now on. After a crash
/// half-way it can be done again.
pub fn revoke(dir: &Path, name: &str) -> Result<Vec<PathBuf>, Failure> {
    check_name(name)?;
    let cert = dir.join(format!("{name}.pem"));
    let there = cert.exists();
    if there {
        let number = hex::encode(serial_in(&cert)?);
        let folder = dir.join("revoked");
        std::fs::create_dir_all(&folder).map_err(|e| io("make", &folder, &e))?;
        let to = folder.join(format!("{name}-{number}.pem"));
        std::fs::rename(&cert, &to).map_err(|e| io("move", &cert, &e))?;
    }
    let key = dir.join(format!("{name}.key"));
    match std::fs::remove_file(&key) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("delete", &key, &e)),
        _ => {}
    }
    let list = write_list(dir)?;
    if !there {
        return Err(Failure::usage(format!(
            "there is no certificate {}; those revoked before are in {}",
            cert.display(),
            list.display()
        )));
    }
    Ok(vec![list])
}

/// Makes `ca.crl`, in one step, of what is in `revoked/`.
fn write_list(dir: &Path) -> Result<PathBuf, Failure> {
    let folder = dir.join("revoked");
    let now = time::OffsetDateTime::now_utc();
    let mut revoked_certs = Vec::new();
    let files = match std::fs::read_dir(&folder) {
        Ok(files) => Some(files),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(io("read", &folder, &e)),
    };
    for file in files.into_iter().flatten() {
        let file = file.map_err(|e| io("read", &folder, &e))?;
        revoked_certs.push(RevokedCertParams {
            serial_number: SerialNumber::from(serial_in(&file.path())?),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        });
    }
    let list = CertificateRevocationListParams {
        this_update: now - time::Duration::hours(1),
        // Nobody looks at it: a list is good until there is a new one.
        next_update: now + time::Duration::days(3650),
        crl_number: SerialNumber::from(now.unix_timestamp().unsigned_abs()),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&authority(dir)?).map_err(broken)?;
    let (path, new) = (dir.join("ca.crl"), dir.join("ca.crl.new"));
    let pem = list.pem().map_err(broken)?;
    std::fs::File::create(&new)
        .and_then(|mut f| f.write_all(pem.as_bytes()).and_then(|()| f.sync_all()))
        .and_then(|()| std::fs::rename(&new, &path))
        .map_err(|e| io("write", &path, &e))?;
    Ok(path)
}

fn serial_in(path: &Path) -> Result<Vec<u8>, Failure> {
    let what = |e: &dyn std::fmt::Display| {
        Failure::usage(format!("no certificate in {}: {e}", path.display()))
    };
    let cert = CertificateDer::from_pem_file(path).map_err(|e| what(&e))?;
    serial(&cert).map_err(|e| what(&e))
}

fn check_name(name: &str) -> Result<(), Failure> {
    if is_name(name) && name != "ca" {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "'{name}' cannot be a name here: {NAME_RULE}, and not 'ca'"
    )))
}

/// What `init` made.
fn authority(dir: &Path) -> Result<Issuer<'static, KeyPair>, Failure> {
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
    Issuer::from_ca_cert_pem(&ca_cert, ca_key).map_err(garbage)
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
    use gangway_shared::pki::{Credentials, PkiError};
    use rustls::pki_types::UnixTime;

    use super::*;

    fn files(dir: &Path, name: &str, crl: &str) -> TlsFiles {
        TlsFiles {
            cert: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
            ca: dir.join("ca.pem"),
            crl: Some(dir.join(crl)),
        }
    }

    #[test]
    fn what_is_revoked_stays_so_and_the_name_can_be_issued_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let d = dir.path();
        let made = init(d).expect("init");
        assert_eq!(made.last(), Some(&d.join("ca.crl")), "an empty one");
        let load = |name: &str| Credentials::load(&files(d, name, "ca.crl"), UnixTime::now());
        for name in ["me", "you", "she"] {
            issue(d, name, Role::Coordinator, &[]).expect("issue");
            load(name).expect("it counts");
        }
        let keep = |name: &str| {
            for ext in ["pem", "key"] {
                let file = d.join(format!("{name}.{ext}"));
                std::fs::copy(file, d.join(format!("old-{name}.{ext}"))).expect("copy");
            }
        };
        for name in ["me", "you"] {
            keep(name);
            assert_eq!(revoke(d, name).expect("revoke"), [d.join("ca.crl")]);
            assert!(!d.join(format!("{name}.key")).exists());
        }
        issue(d, "me", Role::Coordinator, &[]).expect("a new one");
        for name in ["me", "she"] {
            load(name).expect("it counts");
        }
        for name in ["old-me", "old-you"] {
            let e = load(name).expect_err("revoked");
            assert!(matches!(e, PkiError::Revoked { .. }), "{e}");
            assert!(e.to_string().contains("is revoked in"), "{e}");
        }
        for (name, word) in [("you", "no certificate"), ("../me", "cannot be a name")] {
            let e = revoke(d, name).expect_err("nothing to revoke");
            assert!(e.message.contains(word), "{}", e.message);
        }
        assert!(
            load("old-you").is_err(),
            "the list is made of what there is"
        );
        assert!(revoke(d, "ca").is_err() && d.join("ca.key").exists());
    }

    #[test]
    fn a_list_that_is_not_the_authority_s_is_named() {
        let (dir, other) = (tempfile::tempdir(), tempfile::tempdir());
        let (dir, other) = (dir.expect("tempdir"), other.expect("tempdir"));
        let d = dir.path();
        for d in [d, other.path()] {
            init(d).expect("init");
        }
        issue(d, "a", Role::Host, &[]).expect("issue");
        std::fs::copy(other.path().join("ca.crl"), d.join("other.crl")).expect("copy");
        let garbage = "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n";
        std::fs::write(d.join("garbage.crl"), garbage).expect("write");
        for (crl, word) in [
            (
                "other.crl",
                "other.crl' is no list of what the authority in",
            ),
            (
                "garbage.crl",
                "garbage.crl' is no list of what the authority",
            ),
            ("a.pem", "a.pem': no BEGIN X509 CRL line"),
            ("none.crl", "cannot read list of revoked certificates"),
        ] {
            let e = Credentials::load(&files(d, "a", crl), UnixTime::now()).expect_err(crl);
            assert!(e.to_string().contains(word), "{e}");
        }
    }

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
            crl: None,
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
