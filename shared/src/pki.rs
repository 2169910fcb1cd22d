//! PEM in, identities and trust rules out.
//!
//! Every host and every coordinator has a certificate from one authority. Who a peer is stands in its certificate's
//! subject alternative name and nowhere else: `NAME.host.gangway` or `NAME.coordinator.gangway`. Both sides show
//! theirs (mutual TLS 1.3, provider *ring*, ADR-0004). What the authority has revoked stands in a list that it has signed
//! (RFC 5280, section 5); who has the list believes neither a peer on it nor one of whose authority it has none.
//!
//! Invariant: no process-wide crypto provider is installed or used; no clock in here, `now` is a parameter.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use x509_parser::extensions::GeneralName;

use crate::config::valid::TlsFiles;

/// What a certificate entitles to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A host's switch: it may ship to other hosts.
    Host,
    /// A coordinator: it may control switches.
    Coordinator,
}

impl Role {
    /// The end of the DNS name of a certificate with this role.
    pub const fn suffix(self) -> &'static str {
        match self {
            Role::Host => ".host.gangway",
            Role::Coordinator => ".coordinator.gangway",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Host => "host",
            Role::Coordinator => "coordinator",
        })
    }
}

/// Who a certificate says its holder is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The name, without the role's suffix.
    pub name: String,
    /// The role.
    pub role: Role,
}

impl Identity {
    /// The DNS name that stands for this identity in a certificate.
    pub fn dns_name(&self) -> String {
        format!("{}{}", self.name, self.role.suffix())
    }

    /// The inverse of [`Identity::dns_name`]; `None` if it is no name of ours.
    pub fn from_dns_name(dns: &str) -> Option<Identity> {
        [Role::Host, Role::Coordinator]
            .into_iter()
            .find_map(|role| {
                let name = dns.strip_suffix(role.suffix())?;
                is_name(name).then(|| Identity {
                    name: name.to_owned(),
                    role,
                })
            })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} '{}'", self.role, self.name)
    }
}

/// True for names that hosts and coordinators may have: 1 to 63 of `[A-Za-z0-9._-]`, such that it makes a DNS name.
pub fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && rustls_pki_types::DnsName::try_from(format!("{name}{}", Role::Host.suffix())).is_ok()
}

/// What is wrong with a certificate, a key, or the files that they are in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// The operator's: a file that is missing or not readable.
    #[error("cannot read {what} '{path}': {reason}; check the path and its permissions")]
    Read {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The operator's: the file has other contents.
    #[error("no {what} in '{path}': {reason}; it must be a PEM file as `gangway pki` writes it")]
    NotPem {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The operator's: files of different certificates were mixed.
    #[error(
        "key '{key}' does not belong to certificate '{cert}'; take both from the same `gangway pki issue`"
    )]
    KeyMismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The operator's: time for a new certificate.
    #[error(
        "certificate '{path}' expired on {not_after}; issue a new one with `gangway pki issue`"
    )]
    Expired {
        /// Its file.
        path: PathBuf,
        /// Its last moment.
        not_after: String,
    },
    /// The operator's, or the clock's.
    #[error("certificate '{path}' is valid only from {not_before}; check this host's clock")]
    NotYetValid {
        /// Its file.
        path: PathBuf,
        /// Its first moment.
        not_before: String,
    },
    /// The operator's: another authority.
    #[error(
        "certificate '{cert}' was not issued by the authority in '{ca}' ({reason}); all hosts and coordinators need certificates from one authority"
    )]
    NotIssuedBy {
        /// The certificate's file.
        cert: PathBuf,
        /// The authority's file.
        ca: PathBuf,
        /// As rustls puts it.
        reason: String,
    },
    /// The operator's: the authority has taken it back.
    #[error("certificate '{cert}' is revoked in '{crl}'; issue a new one with `gangway pki issue`")]
    Revoked {
        /// The certificate's file.
        cert: PathBuf,
        /// The list's file.
        crl: PathBuf,
    },
    /// The operator's: another authority's list, or none.
    #[error(
        "'{crl}' is no list of what the authority in '{ca}' has revoked ({reason}); take both from the same folder of `gangway pki`"
    )]
    ForeignList {
        /// The list's file.
        crl: PathBuf,
        /// The authority's file.
        ca: PathBuf,
        /// As rustls puts it.
        reason: String,
    },
    /// The peer's (or the operator's): not X.509.
    #[error("not an X.509 certificate: {0}")]
    BadCertificate(String),
    /// The peer's (or the operator's): a valid certificate for something else.
    #[error(
        "the certificate names neither a host (NAME.host.gangway) nor a coordinator (NAME.coordinator.gangway), but {0}; issue it with `gangway pki issue`"
    )]
    NoIdentity(String),
    /// The peer's (or the operator's): a certificate must be for one identity.
    #[error("the certificate has more than one identity: {0}")]
    Ambiguous(String),
    /// The peer has shown no certificate.
    #[error("the peer has shown no certificate")]
    NoCertificate,
    /// The caller's: not a name that a certificate can be for.
    #[error(
        "'{0}' is not a name: 1 to 63 of A-Z a-z 0-9 . _ -, beginning and ending with a letter or digit"
    )]
    BadName(String),
    /// Ours.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// Who the holder of `cert` is. Does *not* check who issued it: the TLS handshake does.
pub fn peer_identity(cert: &CertificateDer<'_>) -> Result<Identity, PkiError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(cert)
        .map_err(|e| PkiError::BadCertificate(e.to_string()))?;
    let san = parsed
        .subject_alternative_name()
        .map_err(|e| PkiError::BadCertificate(e.to_string()))?;
    let names: Vec<&str> = san
        .iter()
        .flat_map(|s| &s.value.general_names)
        .filter_map(|n| match n {
            GeneralName::DNSName(d) => Some(*d),
            _ => None,
        })
        .collect();
    let mut found = names.iter().filter_map(|n| Identity::from_dns_name(n));
    match (found.next(), found.next()) {
        (Some(identity), None) => Ok(identity),
        (Some(a), Some(b)) => Err(PkiError::Ambiguous(format!("{a}, {b}"))),
        (None, _) if names.is_empty() => Err(PkiError::NoIdentity("no DNS name at all".to_owned())),
        (None, _) => Err(PkiError::NoIdentity(
            names.join(", ").escape_debug().to_string(),
        )),
    }
}

/// The number by which a list of revoked certificates names this one.
pub fn serial(cert: &CertificateDer<'_>) -> Result<Vec<u8>, PkiError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(cert)
        .map_err(|e| PkiError::BadCertificate(e.to_string()))?;
    Ok(parsed.raw_serial().to_vec())
}

/// The name to ask for when dialling `host`: the handshake fails unless its certificate is that host's.
pub fn host_server_name(host: &str) -> Result<String, PkiError> {
    if !is_name(host) {
        return Err(PkiError::BadName(host.to_owned()));
    }
    Ok(format!("{host}{}", Role::Host.suffix()))
}

/// Whom to believe.
#[derive(Debug, Clone)]
struct Trust {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    /// None: nothing is revoked.
    crls: Vec<CertificateRevocationListDer<'static>>,
}

impl Trust {
    /// Peers that dial us.
    fn clients(&self) -> Result<Arc<dyn ClientCertVerifier>, VerifierBuilderError> {
        let (roots, provider) = (Arc::clone(&self.roots), Arc::clone(&self.provider));
        WebPkiClientVerifier::builder_with_provider(roots, provider)
            .with_crls(self.crls.iter().cloned())
            .build()
    }

    /// Peers that we dial.
    fn servers(&self) -> Result<Arc<WebPkiServerVerifier>, VerifierBuilderError> {
        let (roots, provider) = (Arc::clone(&self.roots), Arc::clone(&self.provider));
        WebPkiServerVerifier::builder_with_provider(roots, provider)
            .with_crls(self.crls.iter().cloned())
            .build()
    }
}

/// A certificate, its key and the authority, checked against each other.
#[derive(Debug, Clone)]
pub struct Credentials {
    identity: Identity,
    trust: Trust,
    certified: Arc<CertifiedKey>,
}

impl Credentials {
    /// Reads the files and checks that they fit together at `now`.
    pub fn load(files: &TlsFiles, now: UnixTime) -> Result<Credentials, PkiError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain: Vec<CertificateDer<'static>> =
            read_pem("certificate", "CERTIFICATE", &files.cert)?;
        let authority: Vec<CertificateDer<'static>> =
            read_pem("authority's certificate", "CERTIFICATE", &files.ca)?;
        let crls: Vec<CertificateRevocationListDer<'static>> = match &files.crl {
            Some(crl) => read_pem("list of revoked certificates", "X509 CRL", crl)?,
            None => Vec::new(),
        };
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|e| pem_error("private key", &files.key, e))?;

        let mut roots = RootCertStore::empty();
        for ca in authority {
            roots.add(ca).map_err(|e| PkiError::NotPem {
                what: "authority's certificate",
                path: files.ca.clone(),
                reason: e.to_string(),
            })?;
        }
        let trust = Trust {
            provider,
            roots: Arc::new(roots),
            crls,
        };
        let leaf = chain.first().ok_or(PkiError::NoCertificate)?;
        check_dates(leaf, &files.cert, now)?;
        let identity = peer_identity(leaf)?;
        check_issuer(&chain, &identity, &trust, files, now)?;

        let certified =
            CertifiedKey::from_der(chain, key, &trust.provider).map_err(|e| match e {
                rustls::Error::InconsistentKeys(_) => PkiError::KeyMismatch {
                    cert: files.cert.clone(),
                    key: files.key.clone(),
                },
                e => PkiError::NotPem {
                    what: "usable private key",
                    path: files.key.clone(),
                    reason: e.to_string(),
                },
            })?;
        Ok(Credentials {
            identity,
            trust,
            certified: Arc::new(certified),
        })
    }

    /// Who we are.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// For the accepting side: TLS 1.3, a certificate of our authority is demanded from the peer.
    pub fn server_config(&self, alpns: &[&[u8]]) -> Result<ServerConfig, PkiError> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.trust.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(self.trust.clients().map_err(not_set_up)?)
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(
                &self.certified,
            ))));
        config.alpn_protocols = alpns.iter().map(|a| a.to_vec()).collect();
        // No resumption: each connection proves its certificate anew, and commands never travel as 0-RTT.
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// For the dialling side. The peer's name is checked against what the dialler asks for: [`host_server_name`].
    pub fn client_config(&self, alpn: &[u8]) -> Result<ClientConfig, PkiError> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.trust.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_webpki_verifier(self.trust.servers().map_err(not_set_up)?)
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(
                &self.certified,
            ))));
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

/// [`Credentials::load`] and [`Credentials::server_config`] in one.
pub fn server_config(
    files: &TlsFiles,
    alpns: &[&[u8]],
    now: UnixTime,
) -> Result<ServerConfig, PkiError> {
    Credentials::load(files, now)?.server_config(alpns)
}

/// [`Credentials::load`] and [`Credentials::client_config`] in one.
pub fn client_config(
    files: &TlsFiles,
    alpn: &[u8],
    now: UnixTime,
) -> Result<ClientConfig, PkiError> {
    Credentials::load(files, now)?.client_config(alpn)
}

fn not_set_up(e: VerifierBuilderError) -> PkiError {
    PkiError::Tls(rustls::Error::General(e.to_string()))
}

/// All `label`s of a file; at least one.
fn read_pem<T: PemObject>(
    what: &'static str,
    label: &str,
    path: &Path,
) -> Result<Vec<T>, PkiError> {
    let found = T::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| pem_error(what, path, e))?;
    if found.is_empty() {
        return Err(PkiError::NotPem {
            what,
            path: path.to_owned(),
            reason: format!("no BEGIN {label} line"),
        });
    }
    Ok(found)
}

fn pem_error(what: &'static str, path: &Path, e: rustls_pki_types::pem::Error) -> PkiError {
    let path = path.to_owned();
    match e {
        rustls_pki_types::pem::Error::Io(e) => PkiError::Read {
            what,
            path,
            reason: e.to_string(),
        },
        e => PkiError::NotPem {
            what,
            path,
            reason: e.to_string(),
        },
    }
}

fn check_dates(leaf: &CertificateDer<'_>, path: &Path, now: UnixTime) -> Result<(), PkiError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf)
        .map_err(|e| PkiError::BadCertificate(e.to_string()))?;
    let (from, to) = (parsed.validity().not_before, parsed.validity().not_after);
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now > to.timestamp() {
        return Err(PkiError::Expired {
            path: path.to_owned(),
            not_after: to.to_string(),
        });
    }
    if now < from.timestamp() {
        return Err(PkiError::NotYetValid {
            path: path.to_owned(),
            not_before: from.to_string(),
        });
    }
    Ok(())
}

/// What the peers will check, checked here first, where the operator sees it: as a client, and a host as a server too.
fn check_issuer(
    chain: &[CertificateDer<'static>],
    identity: &Identity,
    trust: &Trust,
    files: &TlsFiles,
    now: UnixTime,
) -> Result<(), PkiError> {
    use rustls::Error as E;
    let no_list = |reason: String| match &files.crl {
        Some(crl) => PkiError::ForeignList {
            crl: crl.clone(),
            ca: files.ca.clone(),
            reason,
        },
        None => PkiError::Tls(E::General(reason)),
    };
    let wrong = |e: E| match (e, &files.crl) {
        (E::InvalidCertificate(CertificateError::Revoked), Some(crl)) => PkiError::Revoked {
            cert: files.cert.clone(),
            crl: crl.clone(),
        },
        (
            e @ (E::InvalidCertificate(CertificateError::UnknownRevocationStatus)
            | E::InvalidCertRevocationList(_)),
            _,
        ) => no_list(e.to_string()),
        (e, _) => PkiError::NotIssuedBy {
            cert: files.cert.clone(),
            ca: files.ca.clone(),
            reason: e.to_string(),
        },
    };
    let Some((leaf, between)) = chain.split_first() else {
        return Err(PkiError::NoCertificate);
    };
    let clients = trust.clients().map_err(|e| no_list(e.to_string()))?;
    clients
        .verify_client_cert(leaf, between, now)
        .map_err(wrong)?;
    if identity.role == Role::Host {
        let name = ServerName::try_from(identity.dns_name())
            .map_err(|_| PkiError::BadName(identity.name.clone()))?;
        let servers = trust.servers().map_err(|e| no_list(e.to_string()))?;
        servers
            .verify_server_cert(leaf, between, &name, &[], now)
            .map_err(wrong)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_the_end_of_the_name_and_nothing_else() {
        let of = |dns| Identity::from_dns_name(dns).map(|i| i.to_string());
        assert_eq!(of("kvm-1.host.gangway").as_deref(), Some("host 'kvm-1'"));
        assert_eq!(
            of("me.coordinator.gangway").as_deref(),
            Some("coordinator 'me'")
        );
        // The last suffix counts: whoever may issue names below a host's cannot make a coordinator of it.
        assert_eq!(
            of("x.coordinator.gangway.host.gangway").as_deref(),
            Some("host 'x.coordinator.gangway'")
        );
        for dns in [
            "",
            ".host.gangway",
            "*.host.gangway",
            "a.host.gangway.",
            "a.host.gangway.example.org",
            "a.HOST.gangway",
            "ahost.gangway",
            "a/b.host.gangway",
            "a..host.gangway",
            "-a.host.gangway",
            "a\n.host.gangway",
        ] {
            assert_eq!(of(dns), None, "{dns:?}");
        }
    }

    #[test]
    fn names_make_dns_names() {
        for good in ["a", "kvm1", "Rack_2.kvm-1", &"x".repeat(63)] {
            assert!(is_name(good), "{good}");
            let dns = host_server_name(good).expect("name");
            assert_eq!(
                Identity::from_dns_name(&dns).map(|i| i.name).as_deref(),
                Some(good)
            );
        }
        for bad in [
            "",
            ".",
            "a.",
            "a-",
            "_a",
            "a b",
            "a\0",
            "ä",
            &"x".repeat(64),
        ] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn garbage_is_no_certificate() {
        let cert = CertificateDer::from(vec![0x30, 0x82, 0xff, 0xff, 1]);
        assert!(matches!(
            peer_identity(&cert),
            Err(PkiError::BadCertificate(_))
        ));
    }
}
