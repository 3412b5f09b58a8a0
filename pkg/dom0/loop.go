package dom0

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Attach implements Dom0. A block device is used as it is.
func (s *System) Attach(ctx context.Context, image string, readOnly bool) (Device, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	var dev Device
	err := effect("attach", func() (err error) {
		s.attach.Lock()
		defer s.attach.Unlock()
		dev, err = attachImage(ctx, image, readOnly)
		return err
	}, func() { dev.Close() })
	if err != nil {
		return nil, err
	}
	return dev, nil
}

// attachImage makes a block device of image.
func attachImage(ctx context.Context, image string, readOnly bool) (Device, error) {
	st, err := os.Stat(image)
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	if st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0 {
		return blockDevice(image), nil
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("attach %s: neither a file nor a block device", image)
	}
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	}
	back, err := os.OpenFile(image, flag, 0)
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", image, err)
	}
	defer ctl.Close()
	dev, err := takeLoop(ctx, ctl, back, readOnly)
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", image, err)
	}
	return dev, nil
}

// takeLoop asks for a free loop device until one was free long enough for us
// to configure it: others may be quicker.
func takeLoop(ctx context.Context, ctl, back *os.File, readOnly bool) (Device, error) {
	const tries = 500
	for try := 1; ; try++ {
		dev, err := tryLoop(ctl, back, readOnly)
		if err == nil {
			return dev, nil
		}
		// EBUSY: taken meanwhile. ENXIO, ENODEV: removed meanwhile.
		lost := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV)
		if !lost || try == tries {
			return nil, err
		}
		longest := min(time.Duration(try)*200*time.Microsecond, 20*time.Millisecond)
		if !pause(ctx, rand.N(longest)+time.Microsecond) {
			return nil, context.Cause(ctx)
		}
	}
}

func tryLoop(ctl, back *os.File, readOnly bool) (Device, error) {
	n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, fmt.Errorf("find a free loop device: %w", err)
	}
	f, err := openLoop(n, readOnly)
	if err != nil {
		return nil, err
	}
	if err := configure(int(f.Fd()), back, readOnly); err != nil {
		f.Close()
		return nil, fmt.Errorf("configure %s: %w", f.Name(), err)
	}
	return &loopDevice{f: f}, nil
}

// openLoop opens /dev/loopN and makes the node where nothing else does, as in
// a container without devtmpfs.
func openLoop(n int, readOnly bool) (*os.File, error) {
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	}
	path := fmt.Sprintf("/dev/loop%d", n)
	f, err := os.OpenFile(path, flag, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	err = unix.Mknod(path, unix.S_IFBLK|0o660, int(unix.Mkdev(7, uint32(n))))
	if err != nil && err != unix.EEXIST {
		return nil, fmt.Errorf("make %s: %w", path, err)
	}
	return os.OpenFile(path, flag, 0)
}

// configure binds the loop device to back, with direct I/O if the filesystem
// below can, in one step where the kernel (5.8) can.
func configure(dev int, back *os.File, readOnly bool) error {
	info := unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}
	if readOnly {
		info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(info.File_name[:len(info.File_name)-1], filepath.Base(back.Name()))
	config := unix.LoopConfig{Fd: uint32(back.Fd()), Info: info}
	config.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	err := unix.IoctlLoopConfigure(dev, &config)
	if err == unix.EINVAL {
		config.Info = info
		err = unix.IoctlLoopConfigure(dev, &config)
	}
	if err != unix.EINVAL && err != unix.ENOTTY {
		return err
	}
	return configureInSteps(dev, back, info)
}

// configureInSteps is for kernels before LOOP_CONFIGURE.
func configureInSteps(dev int, back *os.File, info unix.LoopInfo64) error {
	if err := unix.IoctlSetInt(dev, unix.LOOP_SET_FD, int(back.Fd())); err != nil {
		return err
	}
	var err error
	for range 64 {
		// EAGAIN: pages of an earlier life are still being dropped.
		if err = unix.IoctlLoopSetStatus64(dev, &info); err != unix.EAGAIN {
			break
		}
	}
	if err != nil {
		return errors.Join(err, unix.IoctlSetInt(dev, unix.LOOP_CLR_FD, 0))
	}
	return nil
}

// loopDevice is held by its open descriptor.
type loopDevice struct {
	f    *os.File
	once sync.Once
	err  error
}

// Path implements Device.
func (d *loopDevice) Path() string { return d.f.Name() }

// Close implements Device.
func (d *loopDevice) Close() error {
	d.once.Do(func() { d.err = d.f.Close() })
	return d.err
}

// blockDevice is a device that was there before us.
type blockDevice string

// Path implements Device.
func (d blockDevice) Path() string { return string(d) }

// Close implements Device.
func (d blockDevice) Close() error { return nil }
