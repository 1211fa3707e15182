# What the seed's sniffer for Windows does, on Linux: see examples/sniffer.rs.
import socket
import struct

SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_DROP_MEMBERSHIP, PACKET_MR_PROMISC, ETH_P_ALL = 263, 1, 2, 1, 3

# the network interface
HOST = 'lo'

# create a raw socket and bind it to the interface
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind((HOST, ETH_P_ALL))

# receive all packages
promiscuous = struct.pack('IHH8x', socket.if_nametoindex(HOST), PACKET_MR_PROMISC, 0)
s.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, promiscuous)
print('sniffing on', HOST, flush=True)

# receive two packages
for _ in range(2):
    print(s.recvfrom(65565))

# disabled promiscuous mode
s.setsockopt(SOL_PACKET, PACKET_DROP_MEMBERSHIP, promiscuous)
