// Go's own encoding/gob as the judge of kms-core's codec: decodes what Rust wrote, and writes
// random values in every shape that still is the plug-in's struct to a reader.
package main

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/json"
	"log"
	"math"
	"math/rand"
	"os"
	"strings"
)

type Secret struct {
	KpVersion  int
	WrappedDEK []byte
	Cipher     string
}

// Value is one stream and what it means.
type Value struct {
	Stream []byte
	Secret
}

type Inner struct {
	Name  string
	Flags []bool
	Next  *Inner
}

type selfMade struct{ text string }

func (s selfMade) GobEncode() ([]byte, error)   { return []byte(s.text), nil }
func (s *selfMade) GobDecode(text []byte) error { s.text = string(text); return nil }

// Reordered has the fields in another order and others between them.
type Reordered struct {
	Before     float64
	Cipher     string
	Map        map[string][]Inner
	WrappedDEK []byte
	Array      [3]int16
	Complex    complex128
	Any        interface{}
	Made       selfMade
	KpVersion  int
	After      *Inner
}

// Pointers and sizes do not show on the wire.
type Pointers struct {
	KpVersion  *int32
	WrappedDEK *[]uint8
	Cipher     *string
}

type OnlyCipher struct{ Cipher string }

func main() {
	var request struct {
		Decode [][]byte
		Count  int
		Seed   int64
	}
	check(json.NewDecoder(os.Stdin).Decode(&request))
	gob.Register(Inner{})

	var answer struct{ Decoded, Written []Value }
	for _, stream := range request.Decode {
		value := Value{Stream: stream}
		check(gob.NewDecoder(bytes.NewReader(stream)).Decode(&value.Secret))
		answer.Decoded = append(answer.Decoded, value)
	}
	random := rand.New(rand.NewSource(request.Seed))
	for i := 0; i < request.Count; i++ {
		answer.Written = append(answer.Written, written(random))
	}
	check(json.NewEncoder(os.Stdout).Encode(answer))
}

func written(random *rand.Rand) Value {
	secret := Secret{number(random), slice(random), base64.StdEncoding.EncodeToString(slice(random))}
	var shape interface{} = secret
	switch random.Intn(6) {
	case 0:
		shape = Reordered{
			Before: random.NormFloat64(), Cipher: secret.Cipher, WrappedDEK: secret.WrappedDEK,
			Map:     map[string][]Inner{strings.Repeat("k", random.Intn(300)): {inner(random), {}}},
			Array:   [3]int16{int16(random.Int()), 0, -1},
			Complex: complex(random.Float64(), 1), Any: inner(random), Made: selfMade{"made"},
			KpVersion: secret.KpVersion, After: &Inner{Name: "last"},
		}
	case 1:
		secret.KpVersion = int(int32(secret.KpVersion))
		version := int32(secret.KpVersion)
		shape = Pointers{&version, &secret.WrappedDEK, &secret.Cipher}
	case 2:
		secret = Secret{Cipher: secret.Cipher}
		shape = &OnlyCipher{secret.Cipher}
	}
	var stream bytes.Buffer
	check(gob.NewEncoder(&stream).Encode(shape))
	return Value{stream.Bytes(), secret}
}

func inner(random *rand.Rand) Inner {
	return Inner{Name: "inner", Flags: make([]bool, random.Intn(200)), Next: &Inner{Name: "next"}}
}

func number(random *rand.Rand) int {
	edges := []int{0, 1, -1, 63, 64, -64, -65, math.MaxInt64, math.MinInt64}
	if edge := random.Intn(2 * len(edges)); edge < len(edges) {
		return edges[edge]
	}
	return int(random.Uint64() >> uint(random.Intn(64)))
}

func slice(random *rand.Rand) []byte {
	limits := []int{1, 2, 60, 128, 129, 300, 5000}
	bytes := make([]byte, random.Intn(limits[random.Intn(len(limits))]))
	random.Read(bytes)
	return bytes
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
