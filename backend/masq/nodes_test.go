package masq

import (
	"net/netip"
	"strings"
	"testing"
)

// known is a node whose pods other nodes know by their addresses.
func known(t testing.TB, form Form) Config {
	c := dualStack(t)
	c.Form, c.Device = form, "tweed.1"
	c.Own = []netip.Addr{netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("2001:db8::11")}
	c.Near = []netip.Addr{netip.MustParseAddr("192.0.2.12")}
	return c
}

// lines picks the commands that hold a text, in one family.
func lines(c Config, family string, texts ...string) string {
	var picked []string
	for line := range strings.Lines(commands(Diff(c.Desired(), Ruleset{}))) {
		for _, text := range texts {
			if strings.Contains(line, family) && strings.Contains(line, text) {
				picked = append(picked, strings.TrimSuffix(strings.ReplaceAll(line, " -m comment --comment tweed", ""), "\n"))
				break
			}
		}
	}
	return strings.Join(picked, "\n")
}

func TestNodeAndPodAreTranslated(t *testing.T) {
	for _, c := range []struct {
		config       Config
		family, want string
		texts        []string
	}{{
		known(t, IPTables), "ip", `ipset create tweed-near4 hash:ip family inet maxelem 1048576
ipset -! add tweed-near4 192.0.2.12
iptables -t mangle -N TWEED-MARK
iptables -t mangle -I TWEED-MARK 1 -s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN
iptables -t mangle -I TWEED-MARK 2 -s 10.244.3.0/24 -m conntrack --ctstate DNAT --ctdir REPLY -j RETURN
iptables -t mangle -I TWEED-MARK 3 -s 10.244.3.0/24 -j MARK --set-xmark 0x1000/0x1000
iptables -t mangle -I TWEED-MARK 4 -d 10.244.3.0/24 -j MARK --set-xmark 0x1000/0x1000
iptables -t nat -I TWEED-POSTRTG 5 -s 10.244.3.0/24 -o tweed.1 -j RETURN
iptables -t nat -I TWEED-POSTRTG 6 -s 10.244.3.0/24 -m set --match-set tweed-near4 dst -j RETURN
iptables -t nat -I TWEED-POSTRTG 7 -s 192.0.2.11/32 -d 10.244.0.0/16 -j RETURN
ip6tables -t mangle -N TWEED-MARK
ip6tables -t mangle -I TWEED-MARK 1 -s fd00:10:244::/48 -d fd00:10:244::/48 -j RETURN
ip6tables -t mangle -I TWEED-MARK 2 -s fd00:10:244:3::/64 -m conntrack --ctstate DNAT --ctdir REPLY -j RETURN
ip6tables -t mangle -I TWEED-MARK 3 -s fd00:10:244:3::/64 -j MARK --set-xmark 0x1000/0x1000
ip6tables -t mangle -I TWEED-MARK 4 -d fd00:10:244:3::/64 -j MARK --set-xmark 0x1000/0x1000
ip6tables -t nat -I TWEED-POSTRTG 5 -s fd00:10:244:3::/64 -o tweed.1 -j RETURN
ip6tables -t nat -I TWEED-POSTRTG 6 -s 2001:db8::11/128 -d fd00:10:244::/48 -j RETURN
iptables -t mangle -I PREROUTING 1 -i tweed+ -j TWEED-MARK
ip6tables -t mangle -I PREROUTING 1 -i tweed+ -j TWEED-MARK`,
		[]string{"MARK", "near4", "tweed.1", "192.0.2.11", "2001:db8::11"},
	}, {
		known(t, NFTables), " ip ", `nft 'add set ip tweed near { type ipv4_addr ; }'
nft 'add element ip tweed near { 192.0.2.12 }'
nft add chain ip tweed marks
nft insert rule ip tweed marks ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 return comment tweed
nft add rule ip tweed marks index 0 ip saddr 10.244.3.0/24 ct status dnat ct direction reply return comment tweed
nft add rule ip tweed marks index 1 ip saddr 10.244.3.0/24 meta mark set meta mark or 0x1000 comment tweed
nft add rule ip tweed marks index 2 ip daddr 10.244.3.0/24 meta mark set meta mark or 0x1000 comment tweed
nft add rule ip tweed translate index 3 oifname tweed.1 ip saddr 10.244.3.0/24 return comment tweed
nft add rule ip tweed translate index 4 ip saddr 10.244.3.0/24 ip daddr @near return comment tweed
nft add rule ip tweed translate index 5 ip saddr 192.0.2.11/32 ip daddr 10.244.0.0/16 return comment tweed
nft 'add chain ip tweed prerouting-mark { type filter hook prerouting priority -150 ; } ; flush chain ip tweed ` +
			`prerouting-mark ; add rule ip tweed prerouting-mark iifname "tweed*" jump marks comment tweed'`,
		[]string{"tweed mark", "near", "tweed.1", "192.0.2.11", "prerouting"},
	}} {
		if got := lines(c.config, c.family, c.texts...); got != c.want {
			t.Errorf("%s: got\n%s\nwant\n%s", c.config.Form, got, c.want)
		}
	}
}

// A rule in a chain of others cannot name a set that only our table has.
func TestGuestNamesASetOfOurTable(t *testing.T) {
	for g := range known(t, NFTables).Desired().Guests {
		if g.Rule.DstIn != (Set{}) {
			t.Errorf("%v", g.Rule.Words(g.Host.Family))
		}
	}
}
