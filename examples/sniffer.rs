//! The last example of Python's socket page, the Linux way:
//!
//! ```python
//! import socket
//!
//! # the public network interface
//! HOST = socket.gethostbyname(socket.gethostname())
//!
//! # create a raw socket and bind it to the public interface
//! s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IP)
//! s.bind((HOST, 0))
//!
//! # Include IP headers
//! s.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
//!
//! # receive all packages
//! s.ioctl(socket.SIO_RCVALL, socket.RCVALL_ON)
//!
//! # receive a package
//! print s.recvfrom(65565)
//!
//! # disabled promiscuous mode
//! s.ioctl(socket.SIO_RCVALL, socket.RCVALL_OFF)
//! ```
//!
//! Linux has no `SIO_RCVALL` and no raw socket for every IP packet. It has `AF_PACKET`: bound to an interface by name, it
//! receives what passes there, link header included (`SOCK_RAW`), and the membership `PACKET_MR_PROMISC` switches promiscuous
//! mode on. It takes the privilege CAP_NET_RAW.
//!
//! `sniffer [--interface NAME] [--count N]`: by default `lo` and 1. First line on standard output: `sniffing on NAME`; then a
//! line a packet: the pair that recvfrom gives.

use std::io::Write;

use clap::Parser;
use ringsock::PacketAddr;
use ringsock::prelude::*;

/// Prints the packets that pass an interface, which is promiscuous meanwhile. It takes root, or the privilege CAP_NET_RAW.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The network interface
    #[arg(long, default_value = "lo")]
    interface: String,
    /// How many packets to receive
    #[arg(long, default_value_t = 1)]
    count: u64,
}

/// `struct packet_mreq` of linux/if_packet.h: interface 4 | type 2 | address length 2 | address 8.
fn membership(interface: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&interface.to_ne_bytes());
    bytes[4..6].copy_from_slice(&(PACKET_MR_PROMISC as u16).to_ne_bytes());
    bytes
}

fn sniff(options: &Options) -> ringsock::Result<()> {
    // the network interface
    let address = PacketAddr::new(&options.interface, ETH_P_ALL)?;

    // create a raw socket and bind it to the interface; protocol 0 receives nothing before that
    let s = Socket::new(AF_PACKET, SOCK_RAW, 0)?;
    s.bind(address)?;

    // receive all packages
    let promiscuous = membership(address.interface);
    s.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, &promiscuous)?;
    println!("sniffing on {}", options.interface);
    std::io::stdout().flush()?;

    // receive a package
    for _ in 0..options.count {
        let (data, addr) = s.recvfrom(65565)?;
        match addr {
            Some(addr) => println!("({data:?}, {addr})"),
            None => println!("({data:?}, None)"),
        }
    }

    // disabled promiscuous mode
    s.setsockopt(SOL_PACKET, PACKET_DROP_MEMBERSHIP, &promiscuous)
}

fn main() {
    let options = Options::parse();
    if let Err(error) = sniff(&options) {
        let hint = match error.errno() {
            Some(1 | 13) => ": it takes root, or the privilege CAP_NET_RAW",
            _ => "",
        };
        eprintln!("sniffer: {}: {error}{hint}", options.interface);
        std::process::exit(1);
    }
}
