// bench-go-echo SOCKET: KMS v1 and v2 with the least that grpc-go needs, the counterpart of the tonic echo in
// benches/src/lib.rs. What a plug-in in Go costs before it protects anything; what it calls a ciphertext is the
// plaintext. Messages and stubs are Kubernetes' own (k8s.io/kms), grpc-go is the release that kube-apiserver pins.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/kms/apis/v1beta1"
	"k8s.io/kms/apis/v2"
)

// As long as the tonic echo's answers, so that as many bytes travel.
const (
	v1Cipher     = 716
	v2Ciphertext = 442
	keyID        = "echo___/00000000-0000-0000-0000-000000000000/00000000-0000-0000-0000-000000000000/" +
		"00000000-0000-0000-0000-000000000000"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: bench-go-echo SOCKET")
		os.Exit(2)
	}
	if err := serve(os.Args[1]); err != nil {
		fmt.Fprintf(os.Stderr, "bench-go-echo: %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

func serve(path string) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	v1beta1.RegisterKeyManagementServiceServer(server, v1Echo{})
	v2.RegisterKeyManagementServiceServer(server, v2Echo{})
	return server.Serve(listener)
}

type v1Echo struct {
	v1beta1.UnimplementedKeyManagementServiceServer
}

func (v1Echo) Version(context.Context, *v1beta1.VersionRequest) (*v1beta1.VersionResponse, error) {
	return &v1beta1.VersionResponse{Version: "v1beta1", RuntimeName: "bench-go-echo", RuntimeVersion: grpc.Version}, nil
}

func (v1Echo) Encrypt(_ context.Context, request *v1beta1.EncryptRequest) (*v1beta1.EncryptResponse, error) {
	cipher, err := pad(request.Plain, v1Cipher)
	return &v1beta1.EncryptResponse{Cipher: cipher}, err
}

func (v1Echo) Decrypt(_ context.Context, request *v1beta1.DecryptRequest) (*v1beta1.DecryptResponse, error) {
	plain, err := unpad(request.Cipher)
	return &v1beta1.DecryptResponse{Plain: plain}, err
}

type v2Echo struct {
	v2.UnimplementedKeyManagementServiceServer
}

func (v2Echo) Status(context.Context, *v2.StatusRequest) (*v2.StatusResponse, error) {
	return &v2.StatusResponse{Version: "v2", Healthz: "ok", KeyId: keyID}, nil
}

func (v2Echo) Encrypt(_ context.Context, request *v2.EncryptRequest) (*v2.EncryptResponse, error) {
	ciphertext, err := pad(request.Plaintext, v2Ciphertext)
	return &v2.EncryptResponse{Ciphertext: ciphertext, KeyId: keyID}, err
}

func (v2Echo) Decrypt(_ context.Context, request *v2.DecryptRequest) (*v2.DecryptResponse, error) {
	plaintext, err := unpad(request.Ciphertext)
	return &v2.DecryptResponse{Plaintext: plaintext}, err
}

// The plaintext, zeros up to length, and how many of those bytes are plaintext.
func pad(plaintext []byte, length int) ([]byte, error) {
	if len(plaintext)+2 > length {
		return nil, status.Error(codes.InvalidArgument, "too long for an echo")
	}
	padded := make([]byte, length)
	copy(padded, plaintext)
	binary.BigEndian.PutUint16(padded[length-2:], uint16(len(plaintext)))
	return padded, nil
}

func unpad(padded []byte) ([]byte, error) {
	end := len(padded) - 2
	if end < 0 {
		return nil, status.Error(codes.InvalidArgument, "not of this echo")
	}
	held := int(binary.BigEndian.Uint16(padded[end:]))
	if held > end {
		return nil, status.Error(codes.InvalidArgument, "not of this echo")
	}
	return padded[:held], nil
}
