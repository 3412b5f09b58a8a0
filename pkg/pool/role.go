package pool

// Rank is what a host is in its pool.
type Rank string

// The ranks.
const (
	RankCoordinator Rank = "coordinator" // it leads
	RankStandby     Rank = "standby"     // it has the pool database and may lead
	RankMember      Rank = "member"      // it was joined
)

// JoinSpec says which pool to join, and how.
type JoinSpec struct {
	// Address is "https://host:port", or what of it is not the default. With
	// "#" and a fingerprint behind it, it needs no Fingerprint.
	Address string
	// Token is what JoinToken gave on the coordinator, or else User and Password
	// of an admin there, and Fingerprint: the SHA-256 of its public key.
	Token                       string
	User, Password, Fingerprint string
	// TrustKeys takes over the keys whose patches the pool accepts.
	TrustKeys bool
	// Align has the pool apply the patches which this host lacks.
	Align bool
}
