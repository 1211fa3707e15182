//! AF_TIPC: `sockaddr_tipc`.

use super::{Address, SockAddr, ToAddress, expect_family, take, wire_family};
use crate::constants::{
    AF_TIPC, Family, TIPC_ADDR_ID, TIPC_ADDR_NAME, TIPC_ADDR_NAMESEQ, TIPC_CLUSTER_SCOPE,
};
use crate::error::{Error, Result};
use std::fmt;

/// The address of an `AF_TIPC` socket: Python's `(addr_type, v1, v2, v3[, scope])`.
///
/// The scope (`TIPC_CLUSTER_SCOPE` where Python's tuple leaves it out) says how far a bound name
/// is visible. The kernel must have the `tipc` module.
///
/// # Source
///
/// [TIPC](https://docs.kernel.org/networking/tipc.html), `struct sockaddr_tipc`.
///
/// # Example
///
/// ```
/// use ringsock::{AF_TIPC, Address, TIPC_ADDR_NAME, TIPC_CLUSTER_SCOPE, TipcAddr, ToAddress};
///
/// let name = TipcAddr::Name { service: 200, instance: 5, scope: TIPC_CLUSTER_SCOPE };
/// assert_eq!((TIPC_ADDR_NAME, 200, 5, 0).to_address(AF_TIPC)?, Address::from(name));
/// # Ok::<(), ringsock::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TipcAddr {
    /// `TIPC_ADDR_NAMESEQ`: a range of instances of a service.
    NameSeq {
        /// The service, which the kernel calls its type; from 64 on.
        service: u32,
        /// The first instance.
        lower: u32,
        /// The last instance.
        upper: u32,
        /// `TIPC_ZONE_SCOPE`, `TIPC_CLUSTER_SCOPE` or `TIPC_NODE_SCOPE`.
        scope: i8,
    },
    /// `TIPC_ADDR_NAME`: one instance of a service.
    Name {
        /// The service, which the kernel calls its type; from 64 on.
        service: u32,
        /// The instance.
        instance: u32,
        /// `TIPC_ZONE_SCOPE`, `TIPC_CLUSTER_SCOPE` or `TIPC_NODE_SCOPE`.
        scope: i8,
    },
    /// `TIPC_ADDR_ID`: one socket.
    Id {
        /// The node.
        node: u32,
        /// The socket's reference on the node.
        reference: u32,
        /// `TIPC_ZONE_SCOPE`, `TIPC_CLUSTER_SCOPE` or `TIPC_NODE_SCOPE`.
        scope: i8,
    },
}

// sockaddr_tipc of linux/tipc.h: family 2 | kind 1 | scope 1, then 12 bytes, by kind
//
//   TIPC_ADDR_NAMESEQ   type 4 | lower 4 | upper 4
//   TIPC_ADDR_NAME      type 4 | instance 4 | domain 4
//   TIPC_ADDR_ID        reference 4 | node 4 | zeros 4
//
// in the machine's order.
const LEN: usize = 16;

impl TipcAddr {
    /// Python's tuple: what `v1` to `v3` mean depends on the kind.
    fn from_tuple(kind: u32, v1: u32, v2: u32, v3: u32, scope: i8) -> Result<Self> {
        match kind {
            TIPC_ADDR_NAMESEQ => Ok(Self::NameSeq {
                service: v1,
                lower: v2,
                upper: v3,
                scope,
            }),
            TIPC_ADDR_NAME => Ok(Self::Name {
                service: v1,
                instance: v2,
                scope,
            }),
            TIPC_ADDR_ID => Ok(Self::Id {
                node: v1,
                reference: v2,
                scope,
            }),
            _ => Err(Error::Type("Invalid address type".into())),
        }
    }

    pub(super) fn encode(self) -> Result<SockAddr> {
        let (kind, scope, fields) = match self {
            Self::NameSeq {
                service,
                lower,
                upper,
                scope,
            } => (TIPC_ADDR_NAMESEQ, scope, [service, lower, upper]),
            Self::Name {
                service,
                instance,
                scope,
            } => (TIPC_ADDR_NAME, scope, [service, instance, 0]),
            Self::Id {
                node,
                reference,
                scope,
            } => (TIPC_ADDR_ID, scope, [reference, node, 0]),
        };
        let mut bytes = [0; LEN];
        bytes[..2].copy_from_slice(&wire_family(AF_TIPC)?);
        bytes[2] = kind as u8;
        bytes[3] = scope.to_ne_bytes()[0];
        for (field, value) in bytes[4..].chunks_exact_mut(4).zip(fields) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
        Ok(SockAddr::new(&bytes))
    }

    pub(super) fn decode(mut data: &[u8]) -> Option<Address> {
        let [kind, scope] = take(&mut data)?;
        let scope = i8::from_ne_bytes([scope]);
        let first = u32::from_ne_bytes(take(&mut data)?);
        let second = u32::from_ne_bytes(take(&mut data)?);
        let third = u32::from_ne_bytes(take(&mut data)?);
        let (first, second) = match u32::from(kind) {
            TIPC_ADDR_ID => (second, first),
            _ => (first, second),
        };
        let address = Self::from_tuple(kind.into(), first, second, third, scope).ok()?;
        Some(Address::Tipc(address))
    }
}

impl fmt::Display for TipcAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NameSeq {
                service,
                lower,
                upper,
                ..
            } => write!(f, "tipc:{{{service},{lower},{upper}}}"),
            Self::Name {
                service, instance, ..
            } => write!(f, "tipc:{{{service},{instance}}}"),
            Self::Id {
                node, reference, ..
            } => write!(f, "tipc:<{node}:{reference}>"),
        }
    }
}

impl From<TipcAddr> for Address {
    fn from(address: TipcAddr) -> Self {
        Self::Tipc(address)
    }
}

impl ToAddress for TipcAddr {
    fn to_address(&self, family: Family) -> Result<Address> {
        Address::from(*self).for_family(family)
    }
}

/// Python's `(addr_type, v1, v2, v3)`.
impl ToAddress for (u32, u32, u32, u32) {
    fn to_address(&self, family: Family) -> Result<Address> {
        (self.0, self.1, self.2, self.3, TIPC_CLUSTER_SCOPE).to_address(family)
    }
}

/// Python's `(addr_type, v1, v2, v3, scope)`.
impl ToAddress for (u32, u32, u32, u32, i8) {
    fn to_address(&self, family: Family) -> Result<Address> {
        let (kind, v1, v2, v3, scope) = *self;
        expect_family(family, AF_TIPC)?;
        Ok(TipcAddr::from_tuple(kind, v1, v2, v3, scope)?.into())
    }
}
