//! AF_ALG: `sockaddr_alg`.

use super::{Address, SockAddr, ToAddress, wire_family};
use crate::constants::{AF_ALG, Family};
use crate::error::{Error, Result};
use std::fmt;

/// The address of an `AF_ALG` socket, an algorithm of the kernel: Python's
/// `(type, name[, feat[, mask]])`.
///
/// # Source
///
/// [The kernel's cryptography](https://docs.kernel.org/crypto/userspace-if.html),
/// `struct sockaddr_alg`.
///
/// # Example
///
/// ```
/// use ringsock::AlgAddr;
///
/// let address = AlgAddr::new("hash", "sha256");
/// assert_eq!(address.to_string(), "alg:hash:sha256");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct AlgAddr {
    /// The type: `hash`, `skcipher`, `aead`, `rng`; under 14 bytes.
    pub r#type: String,
    /// The name: `sha256`, `cbc(aes)`; under 64 bytes.
    pub name: String,
    /// Features asked for; usually 0.
    pub feat: u32,
    /// Which features count; usually 0.
    pub mask: u32,
}

// sockaddr_alg of linux/if_alg.h: family 2 | type 14 | feat 4 | mask 4 | name 64, the numbers in
// the machine's order, the strings ended by NUL.
const TYPE_LEN: usize = 14;
const NAME_LEN: usize = 64;
const LEN: usize = size_of::<libc::sockaddr_alg>();
const _: () = assert!(LEN == 24 + NAME_LEN);

impl AlgAddr {
    /// Python's `(type, name)`. A pair of strings is no [`ToAddress`]: with it,
    /// `(host, text.parse()?)` could no longer tell that it means a port.
    ///
    /// # Example
    ///
    /// ```
    /// let address = ringsock::AlgAddr::new("skcipher", "cbc(aes)");
    /// assert_eq!((address.feat, address.mask), (0, 0));
    /// ```
    #[must_use]
    pub fn new(r#type: &str, name: &str) -> Self {
        Self {
            r#type: r#type.to_owned(),
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// What the kernel's strings cannot hold.
    fn check(&self) -> Result<()> {
        let text = if self.r#type.contains('\0') || self.name.contains('\0') {
            "embedded null character"
        } else if self.r#type.len() >= TYPE_LEN {
            "AF_ALG type too long."
        } else if self.name.len() >= NAME_LEN {
            "AF_ALG name too long."
        } else {
            return Ok(());
        };
        Err(Error::Value(text.into()))
    }

    pub(super) fn encode(&self) -> Result<SockAddr> {
        self.check()?;
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&wire_family(AF_ALG)?);
        bytes[2..2 + self.r#type.len()].copy_from_slice(self.r#type.as_bytes());
        bytes[16..20].copy_from_slice(&self.feat.to_ne_bytes());
        bytes[20..24].copy_from_slice(&self.mask.to_ne_bytes());
        bytes[24..24 + self.name.len()].copy_from_slice(self.name.as_bytes());
        Ok(SockAddr::new(&bytes))
    }

    /// Strings that end without NUL or are not UTF-8 are none of ours: `None`.
    pub(super) fn decode(data: &[u8]) -> Option<Address> {
        let (kind, data) = data.split_first_chunk::<TYPE_LEN>()?;
        let (feat, data) = data.split_first_chunk()?;
        let (mask, data) = data.split_first_chunk()?;
        let (name, _) = data.split_first_chunk::<NAME_LEN>()?;
        Some(Address::Alg(Box::new(Self {
            r#type: text(kind)?,
            name: text(name)?,
            feat: u32::from_ne_bytes(*feat),
            mask: u32::from_ne_bytes(*mask),
        })))
    }
}

fn text(field: &[u8]) -> Option<String> {
    let end = field.iter().position(|&byte| byte == 0)?;
    Some(std::str::from_utf8(&field[..end]).ok()?.to_owned())
}

impl fmt::Display for AlgAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "alg:{}:{}", self.r#type, self.name)
    }
}

impl From<AlgAddr> for Address {
    fn from(address: AlgAddr) -> Self {
        Self::Alg(Box::new(address))
    }
}

impl ToAddress for AlgAddr {
    fn to_address(&self, family: Family) -> Result<Address> {
        Address::from(self.clone()).for_family(family)?;
        self.check()?;
        Ok(self.clone().into())
    }
}
